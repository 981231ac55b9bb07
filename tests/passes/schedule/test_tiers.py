"""Plans of two memories: sound, as good as any run there is, and better than a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopt.errors import InputError
from mopt.memory import Status
from mopt.passes.schedule import _tier_search
from mopt.passes.schedule._tier_cache import least_recently_used
from mopt.passes.schedule._tier_prefetch import read_ahead
from mopt.passes.schedule._tier_search import solve_tiers
from mopt.tier_check import check_tiers
from mopt.tier_times import Link, run_plan
from mopt.tiers import TierProblem, TierStep, TierValue
from tests.passes.schedule.tier_problems import least_extra_bytes, tier_problems


@settings(max_examples=30)
@given(tier_problems())
def test_whole_values_cost_what_the_best_run_costs(problem: TierProblem) -> None:
    plan = solve_tiers(problem, time_limit=20)
    assert check_tiers(problem, plan) == []
    least = least_extra_bytes(problem)
    assert plan.extra_bound <= least
    # A layout may need more room than the bytes alive; then the plan says that it is not proved.
    assert plan.extra_bytes == least or plan.status is not Status.OPTIMAL


@settings(max_examples=15)
@given(tier_problems(7, pieces=3), st.integers(0, 12))
def test_pieces_and_room_never_cost_more(problem: TierProblem, more: int) -> None:
    plan = solve_tiers(problem, time_limit=20)
    assert check_tiers(problem, plan) == []
    whole = solve_tiers(replace(problem, most_pieces=1), time_limit=20)
    assert plan.extra_bound <= whole.extra_bytes
    roomy = solve_tiers(replace(problem, fast_bytes=problem.fast_bytes + 4 * more), time_limit=20)
    assert roomy.extra_bound <= plan.extra_bytes
    assert plan.extra_bytes <= least_recently_used(problem, drops_dead=True)


@settings(max_examples=15)
@given(tier_problems(7, pieces=2), st.sampled_from([0.5, 4.0, 1e6]), st.sampled_from([0.0, 0.1]))
def test_reading_ahead_moves_the_same_bytes_no_slower(
    problem: TierProblem, bandwidth: float, latency: float
) -> None:
    link = Link(bandwidth, latency)
    plan = solve_tiers(problem, time_limit=20)
    ahead = read_ahead(problem, plan, link)
    assert check_tiers(problem, ahead) == []
    assert ahead.moved_bytes == plan.moved_bytes
    assert run_plan(problem, ahead, link).seconds <= run_plan(problem, plan, link).seconds


def chain_with_a_skip(room: int, **options: int) -> TierProblem:
    """s0 makes a and s3 reads it again; b and c are made and read in between."""
    values = (TierValue("x", 64, given=True), TierValue("a", 128), TierValue("b", 256),
              TierValue("c", 256), TierValue("y", 64, kept=True))  # fmt: skip
    steps = (
        TierStep("s0", ("x",), ("a",), seconds=1),
        TierStep("s1", ("a",), ("b",), before=("s0",), seconds=1),
        TierStep("s2", ("b",), ("c",), before=("s1",), seconds=1),
        TierStep("s3", ("a", "c"), ("y",), before=("s2",), seconds=1),
    )
    return TierProblem(steps, values, room, 16, 16, **options)


def test_the_value_that_lies_idle_leaves() -> None:
    plan = solve_tiers(chain_with_a_skip(512))
    # At s2 both b and c are in use and a is not: written after s0 or s1, read by s3.
    assert plan.extra_bytes == plan.extra_bound == 2 * 128
    assert [s.value for s in plan.spills] == ["y", "a"]
    assert solve_tiers(chain_with_a_skip(640)).extra_bytes == 0


def test_only_the_pieces_without_room_leave() -> None:
    plan = solve_tiers(chain_with_a_skip(576, most_pieces=8))
    assert plan.extra_bytes == 2 * 64
    assert [(s.value, s.first, s.bytes) for s in plan.spills if s.value == "a"] == [("a", 64, 64)]


def test_an_order_that_saves_moves_is_found() -> None:
    values = [TierValue("x", 16, given=True)]
    steps = []
    for n in range(2):
        values += [TierValue(f"large{n}", 128), TierValue(f"small{n}", 16, kept=True)]
        steps.append(TierStep(f"make{n}", ("x",), (f"large{n}",)))
    steps += [
        TierStep(f"use{n}", (f"large{n}",), (f"small{n}",), before=(f"make{n}",)) for n in range(2)
    ]
    problem = TierProblem(tuple(steps), tuple(values), 176, 16, 16)
    plan = solve_tiers(problem)
    assert plan.extra_bytes == 0
    assert plan.order.index("use0") < plan.order.index("make1")
    assert least_recently_used(problem, drops_dead=True) > problem.compulsory_bytes


def test_a_memory_that_takes_nothing_back() -> None:
    problem = replace(chain_with_a_skip(704), writable=False)
    problem = replace(problem, values=tuple(replace(v, kept=False) for v in problem.values))
    plan = solve_tiers(problem)
    assert plan.extra_bytes == 0 and not plan.spills
    assert check_tiers(problem, plan) == []
    with pytest.raises(InputError, match="cannot be written") as caught:
        solve_tiers(replace(problem, fast_bytes=576))
    assert caught.value.code == "fast-memory-too-small"


def test_long_orders_are_divided_and_stay_near_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tier_search, "_WHOLE", 20)
    values, steps = [TierValue("x", 64, given=True)], []
    last = "x"
    for n in range(60):
        values.append(TierValue(f"v{n}", 64 * (1 + n * 7 % 5)))
        reads = (last, f"v{n - 9}") if n > 9 and n % 3 == 0 else (last,)
        before = (f"s{n - 1}",) if n else ()
        steps.append(TierStep(f"s{n}", reads, (f"v{n}",), before=before))
        last = f"v{n}"
    problem = TierProblem(tuple(steps), tuple(values), 1024, 16, 16, 4)
    plan = solve_tiers(problem, time_limit=60)
    assert check_tiers(problem, plan) == []
    assert 0 < plan.extra_bytes <= 1.05 * plan.extra_bound
    assert plan.extra_bytes < least_recently_used(problem) - problem.compulsory_bytes
