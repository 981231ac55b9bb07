"""Offsets: every plan is legal, bounds hold, least peaks are least."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings

from mopt.errors import InputError, UsageError
from mopt.memory import Buffer, Gap, MemoryProblem, Status, Tier
from mopt.memory_check import check_plan
from mopt.passes.schedule import _greedy
from mopt.passes.schedule.offsets import place
from tests.passes.schedule.problems import cut_rectangle, least_peak, plain, problems


@given(problems())
@settings(max_examples=150)
def test_every_plan_passes_the_checker(problem: MemoryProblem) -> None:
    plan = place(problem, time_limit=2)
    assert check_plan(problem, plan) == []
    assert plan.offsets.keys() == {b.id for b in problem.buffers}


@given(problems(most=8, plain_only=True))
@settings(max_examples=40)
def test_bound_exact_search_greedy(problem: MemoryProblem) -> None:
    plan = place(problem, time_limit=5)
    assert plan.status is Status.OPTIMAL
    exact = least_peak(problem)
    storages = problem.storages
    taken = [s for s in storages if s.size]
    greedy = [
        _greedy.top_of(taken, _greedy.place(taken, rule.order, rule.best_fit))
        for rule in _greedy.rules(taken)
    ] or [0]
    assert problem.peak_load().bytes <= plan.lower_bound <= exact
    assert exact == plan.peak <= min(greedy)


@given(problems(most=7, plain_only=True))
@settings(max_examples=25)
def test_alignment_is_counted_exactly(problem: MemoryProblem) -> None:
    aligned = MemoryProblem(tuple(
        Buffer(b.id, b.lower, b.upper, b.size, (1, 4, 8)[k % 3])
        for k, b in enumerate(problem.buffers)
    ))  # fmt: skip
    plan = place(aligned, time_limit=5)
    assert check_plan(aligned, plan) == []
    assert plan.status is Status.OPTIMAL
    assert plan.peak == least_peak(aligned)


@given(problems(plain_only=True))
@settings(max_examples=40)
def test_a_larger_capacity_never_fails_where_a_smaller_one_succeeded(
    problem: MemoryProblem,
) -> None:
    least = place(problem, time_limit=5).peak
    fits = []
    for capacity in range(max(0, least - 2), least + 4):
        plan = place(MemoryProblem(problem.buffers, capacity), time_limit=5)
        assert check_plan(MemoryProblem(problem.buffers, capacity), plan) == []
        assert plan.status is not Status.TIME_OUT
        fits.append(plan.fits)
        assert plan.fits == (capacity >= least)
    assert all(small <= large for small, large in pairwise(fits))


@pytest.mark.parametrize("seed", range(4))
def test_packings_without_waste_are_found(seed: int) -> None:
    problem = cut_rectangle(100, seed)
    plan = place(problem, time_limit=20)
    assert check_plan(problem, plan) == []
    assert plan.peak == 256 * 64
    assert plan.status is Status.OPTIMAL
    assert plan.solver == "search"


def test_the_load_may_be_out_of_reach_and_that_is_proved() -> None:
    # Below the fixed one there is room for 4, which is too little for the other.
    buffers = (Buffer("a", 0, 4, 4, offset=4), Buffer("b", 1, 3, 6), Buffer("c", 2, 5, 2))
    plan = place(MemoryProblem(buffers))
    assert plan.binding is not None
    assert plan.binding.bytes == 12
    assert (plan.peak, plan.lower_bound, plan.status) == (14, 14, Status.OPTIMAL)
    refused = place(MemoryProblem(buffers, 13))
    assert refused.status is Status.INFEASIBLE
    assert check_plan(MemoryProblem(buffers, 13), refused) == []


def test_lives_that_touch_share_and_equal_lives_do_not() -> None:
    touching = place(plain([(0, 3, 64), (3, 5, 64)]))
    assert touching.peak == 64
    equal = place(plain([(0, 3, 64), (0, 3, 64), (0, 3, 0)]))
    assert equal.peak == 128


def test_nothing_to_place() -> None:
    plan = place(MemoryProblem(()))
    assert (plan.peak, plan.lower_bound, plan.status) == (0, 0, Status.OPTIMAL)
    plan = place(plain([(0, 3, 0), (1, 2, 0)], 0))
    assert plan.offsets == {"0": 0, "1": 0}
    assert plan.status is Status.OPTIMAL


def test_huge_sizes_are_placed_exactly() -> None:
    size = 2**57 + 1
    plan = place(plain([(0, 2, size), (1, 3, size), (2, 4, size)]))
    assert plan.peak == 2 * size
    assert plan.status is Status.OPTIMAL


def test_a_capacity_below_the_bound_names_moment_and_buffers() -> None:
    problem = plain([(0, 4, 10), (2, 6, 20), (5, 8, 5)], 29)
    plan = place(problem)
    assert plan.status is Status.INFEASIBLE
    assert not plan.fits
    assert plan.binding is not None
    assert (plan.binding.lower, plan.binding.upper, plan.binding.ids) == (2, 4, ("0", "1"))
    assert check_plan(problem, plan) == []


def test_a_capacity_above_the_bound_is_enough() -> None:
    problem = cut_rectangle(60, 9)
    plan = place(MemoryProblem(problem.buffers, 3 * 256 * 64))
    assert plan.fits
    assert plan.lower_bound == 256 * 64


def test_a_storage_stays_where_it_is_fixed() -> None:
    problem = MemoryProblem((
        Buffer("a", 0, 4, 16, offset=8), Buffer("b", 1, 3, 8), Buffer("c", 1, 3, 8),
        Buffer("zero", 0, 1, 0, offset=40),
    ))  # fmt: skip
    plan = place(problem)
    assert plan.offsets["a"] == 8
    assert plan.offsets["zero"] == 40
    assert plan.peak == 32
    assert check_plan(problem, plan) == []


def test_fixed_storages_that_clash_are_refused() -> None:
    buffers = (Buffer("a", 0, 4, 16, offset=8), Buffer("b", 3, 5, 8, offset=20))
    with pytest.raises(InputError, match="'a' and 'b' are both alive at step 3") as caught:
        place(MemoryProblem(buffers))
    assert caught.value.code == "fixed-overlap"
    apart = (Buffer("a", 0, 3, 16, offset=8), Buffer("b", 3, 5, 8, offset=20))
    assert place(MemoryProblem(apart)).peak == 28


def test_gaps_and_windows_are_used() -> None:
    gap = Buffer("a", 0, 6, 10, gaps=(Gap(2, 4),))
    assert place(MemoryProblem((gap, Buffer("b", 2, 4, 10)))).peak == 10
    window = Buffer("a", 0, 6, 10, gaps=(Gap(2, 4, (6, 10)),))
    problem = MemoryProblem((window, Buffer("b", 2, 4, 6)))
    plan = place(problem)
    assert plan.peak == 10
    assert check_plan(problem, plan) == []


def test_hints_are_followed_where_they_cost_nothing() -> None:
    problem = MemoryProblem((Buffer("a", 0, 2, 8, hint=8), Buffer("b", 0, 2, 8, hint=0)))
    assert place(problem).offsets == {"a": 8, "b": 0}


def test_tiers_are_planned_apart() -> None:
    problem = MemoryProblem(
        (Buffer("a", 0, 4, 8), Buffer("w", 0, 4, 32, tier="flash"), Buffer("b", 1, 4, 8)),
        16,
        (Tier("flash", 32),),
    )
    plan = place(problem)
    assert plan.tier_peaks == {"main": 16, "flash": 32}
    assert plan.status is Status.OPTIMAL
    assert check_plan(problem, plan) == []
    tight = MemoryProblem(problem.buffers, 16, (Tier("flash", 31),))
    assert place(tight).status is Status.INFEASIBLE


def test_the_same_seed_gives_the_same_plan() -> None:
    problem = cut_rectangle(80, 3)
    first, second = place(problem, seed=5), place(problem, seed=5)
    assert first.offsets == second.offsets
    assert first.nodes == second.nodes


def test_time_that_runs_out_still_gives_a_plan() -> None:
    problem = cut_rectangle(300, 1, steps=300)
    plan = place(problem, time_limit=1e-6)
    assert plan.timed_out
    assert plan.status is Status.FEASIBLE
    assert check_plan(problem, plan) == []
    short = place(MemoryProblem(problem.buffers, plan.lower_bound), time_limit=1e-6)
    assert short.status is Status.TIME_OUT
    assert check_plan(MemoryProblem(problem.buffers, plan.lower_bound), short) == []
    with pytest.raises(UsageError, match="time limit 0 is not positive"):
        place(problem, time_limit=0)
