"""The rules of the gate: exact ranks, few false alarms, real changes found."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest

from mopt.pairs import PairPlan, collect_pairs
from mopt.sign_test import bound_rank, judge, median_interval, tail_probability


def test_tail_probability_by_counting_every_case() -> None:
    """Each sample is above or below the median like a coin: count all 2^n throws."""
    for n in range(1, 13):
        throws = [sum(throw) for throw in itertools.product((0, 1), repeat=n)]
        for rank in range(1, n + 1):
            below_fewer = sum(below <= rank - 1 for below in throws)
            assert tail_probability(n, rank) == below_fewer / len(throws)


def test_ranks_of_the_three_looks_and_none_below_eight() -> None:
    assert [bound_rank(n) for n in (10, 20, 40)] == [1, 4, 12]
    assert [bound_rank(n) for n in (1, 2, 7)] == [None, None, None]
    assert bound_rank(8) == 1
    for n in range(8, 60):
        rank = bound_rank(n)
        assert rank is not None
        assert tail_probability(n, rank) <= 0.005 < tail_probability(n, rank + 1)


def test_interval_is_at_the_rank_and_says_what_it_holds() -> None:
    samples = list(range(40))
    random.Random(0).shuffle(samples)
    interval = median_interval(samples)
    assert (interval.low, interval.median, interval.high) == (11, 19.5, 28)
    assert interval.confidence == pytest.approx(1 - 2 * 0.00321, abs=1e-4)
    few = median_interval([3.0, 1.0, 2.0])
    assert (few.low, few.median, few.high, few.confidence) == (1.0, 2.0, 3.0, 0.75)
    assert median_interval([1.0]).confidence == 0.0


L = math.log1p(0.05)


@pytest.mark.parametrize(
    ("samples", "is_last", "verdict"),
    [
        ([0.06] * 10, False, "fail"),
        ([0.06] * 9 + [0.04], False, None),
        ([0.04] * 10, False, "pass"),
        ([0.04] * 9 + [0.06], False, None),
        ([0.9] * 7, False, None),
        ([0.9] * 7, True, "noisy"),
        ([0.06] * 5, True, "noisy"),
        ([0.04] * 4 + [0.06] * 6, True, "fail"),
        ([0.04] * 6 + [0.06] * 4, True, "pass"),
        ([-0.02] * 4 + [0.06] * 6, True, "pass"),
        ([-0.2] * 4 + [0.06] * 6, True, "noisy"),
    ],
)
def test_verdicts(samples: list[float], is_last: bool, verdict: str | None) -> None:
    assert judge(samples, L, is_last=is_last) == verdict


class Host:
    """Log times of runs on a shared machine: noise, drift, outliers and level shifts."""

    def __init__(self, seed: int, noise: float, outliers: float, shifts: float) -> None:
        self.random = random.Random(seed)
        self.noise, self.outliers, self.shifts = noise, outliers, shifts
        self.level = self.drift = 0.0

    def run(self) -> float:
        self.drift += self.random.gauss(0, 0.004)
        if self.random.random() < 0.02:
            self.level = self.random.choice((0.0, self.shifts))
        spike = abs(self.random.gauss(0, 0.5)) if self.random.random() < self.outliers else 0.0
        return self.drift + self.level + self.random.gauss(0, self.noise) + spike

    def pair(self, change: float) -> float:
        first, second = self.run(), self.run()
        reference, candidate = (first, second) if self.random.random() < 0.5 else (second, first)
        return candidate + change - reference


def usual(seed: int) -> Host:
    return Host(seed, noise=0.03, outliers=0.05, shifts=0.0)


def very_bad(seed: int) -> Host:
    return Host(seed, noise=0.06, outliers=0.12, shifts=0.15)


def shares(host: Callable[[int], Host], change: float, gates: int) -> dict[str, float]:
    plan = PairPlan(tolerance=0.05)
    counts = {"pass": 0, "fail": 0, "noisy": 0}
    for seed in range(gates):
        machine = host(seed)
        _, verdict, _ = collect_pairs(lambda m=machine: m.pair(math.log1p(change)), plan)
        counts[verdict] += 1
    return {verdict: count / gates for verdict, count in counts.items()}


def test_no_false_alarms_between_identical_models() -> None:
    assert shares(usual, 0.0, 1000)["fail"] <= 0.001
    assert shares(very_bad, 0.0, 1000)["fail"] <= 0.003


def test_changes_within_the_tolerance_seldom_fail_and_those_above_do() -> None:
    assert shares(usual, 0.03, 500)["fail"] < 0.05
    assert shares(usual, 0.08, 500)["fail"] > 0.97
    assert shares(usual, 0.10, 500)["fail"] > 0.99


def test_a_very_bad_host_says_noisy_instead_of_pass() -> None:
    found = shares(very_bad, 0.15, 300)
    assert found["fail"] > 0.7 and found["pass"] < 0.01
    assert shares(very_bad, 0.25, 300)["fail"] > 0.98


def test_a_clear_difference_needs_ten_pairs_and_a_close_one_more() -> None:
    def count(change: float) -> int:
        host = usual(1)
        return len(collect_pairs(lambda: host.pair(change), PairPlan(0.05))[0])

    assert count(0.5) == count(-0.5) == 10
    assert count(0.045) in (20, 40)


def test_quick_intervals_hold_what_they_say() -> None:
    """Looking from the 8th pair on and stopping early must not spend more than the 1 %."""
    missed = wrong = 0
    true = 0.02
    for seed in range(4000):
        rng = random.Random(seed)
        found, _, _ = collect_pairs(lambda r=rng: r.gauss(true, 0.05), PairPlan(0.1, quick=True))
        interval = median_interval(found)
        assert 8 <= len(found) <= 10 and interval.confidence >= 0.99
        missed += not interval.low <= true <= interval.high
        same, _, stopped = collect_pairs(lambda r=rng: r.gauss(0, 0.05), PairPlan(0.1, quick=True))
        wrong += stopped == "clear" or not min(same) <= 0 <= max(same)
    assert missed / 4000 <= 0.01
    assert wrong / 4000 <= 0.0125  # 2/2^8 is 0.8 %; three standard errors more


def test_several_models_share_the_error() -> None:
    assert PairPlan(0.1, models=5).looks() == (10, 20, 40)
    assert PairPlan(0.1, models=6).looks() == (20, 40), "10 pairs have no rank for 0.5 %/6"
    assert bound_rank(40, PairPlan(0.1, models=6).tail) == 10


def test_looks_end_where_the_pairs_do() -> None:
    assert PairPlan(0.1, max_pairs=12).looks() == (10, 12)
    assert PairPlan(0.1, max_pairs=3).looks() == (3,)
    assert PairPlan(0.1, max_pairs=40, quick=True).looks() == (10,)


def test_time_ends_it_before_it_is_over() -> None:
    now = 0.0

    def draw() -> float:
        nonlocal now
        now += 3.0
        return 0.2 if now < 10 else -0.2

    seen: list[tuple[int, int]] = []
    found, verdict, stopped = collect_pairs(
        draw, PairPlan(0.1, max_seconds=20), clock=lambda: now,
        progress=lambda done, planned: seen.append((done, planned)),
    )  # fmt: skip
    assert (len(found), verdict, stopped, now) == (6, "noisy", "time", 18.0)
    assert seen == [(i, 40) for i in range(6)]
    now = 0.0
    assert len(collect_pairs(draw, PairPlan(0.1, max_seconds=1), clock=lambda: now)[0]) == 1
