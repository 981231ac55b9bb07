"""Plans of training steps: known optima, random problems, budgets below the least peak."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.training_plans import chain
from mopt.errors import BudgetNotMet, InputError, InternalError
from mopt.passes.checkpoint._bounds import least_peak, least_seconds
from mopt.passes.checkpoint._exact import solve_exactly
from mopt.passes.checkpoint._order import closed, draft, must_keep, sources
from mopt.passes.checkpoint._tables import Tables
from mopt.passes.checkpoint.plan import plan
from mopt.recompute import (
    Again,
    Call,
    Item,
    PlanStatus,
    RecomputeProblem,
    parse_bytes,
    replay,
)


def with_forms(problem: RecomputeProblem, seed: int) -> RecomputeProblem:
    """The problem with smaller forms of some values: a second way to have them, or the only one."""
    random = Random(seed)
    sizes = list(problem.sizes)
    forward = []
    for index, call in enumerate(problem.forward):
        forward.append(call)
        if random.random() < 0.6:
            form = len(sizes)
            sizes.append(max(16, sizes[index] // 4))
            back = Again((form,), (index,), random.randint(1, 5) / 10, random.choice([0, 32]))
            forward.append(Call(f"s{index}", (index,), (form,), again=back, form="small"))
    return replace(problem, sizes=tuple(sizes), forward=tuple(forward))


def random_problem(seed: int, length: int = 7) -> RecomputeProblem:
    """A forward graph with skips, sizes and times at random; some calls cannot be repeated."""
    random = Random(seed)
    sizes = [random.randint(1, 9) * 64 for _ in range(2 * length)]
    forward = []
    for i in range(length):
        reads = tuple(sorted(random.sample(range(i), min(i, random.randint(1, 2)))))
        time = random.randint(1, 9) / 10
        again = Again(reads, (i,), time) if random.random() < 0.9 else None
        forward.append(Call(f"f{i}", reads, (i,), time, random.choice([0, 64]), again=again))
    backward = []
    for place, i in enumerate(reversed(range(length))):
        own = [i] if random.random() < 0.8 else []
        reads = (*own, *forward[i].reads, *([length + place - 1] if place else []))
        backward.append(Call(f"b{i}", tuple(dict.fromkeys(reads)), (length + place,), 1.0))
    results = frozenset([2 * length - 1])
    return RecomputeProblem(tuple(sizes), tuple(forward), tuple(backward), results=results)


@pytest.mark.parametrize(
    ("length", "budget", "seconds"),
    [(8, 4, 39), (14, 7, 50), (20, 10, 71), (26, 13, 92), (40, 20, 141)],
)
def test_chains_reach_the_published_optimum(length: int, budget: int, seconds: float) -> None:
    # Checkmate's optimum on unit chains at half the memory; see Jain et al., MLSys 2020.
    problem = chain(length)
    found = plan(problem, budget, seconds=1.0)
    assert problem.seconds + found.figures.repeated_seconds == seconds
    assert found.figures.peak <= budget
    if length == 8:
        assert found.status == PlanStatus.OPTIMAL


@pytest.mark.parametrize("forms", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_what_the_exact_program_proves(seed: int, forms: bool) -> None:
    problem = random_problem(seed)
    if forms:
        problem = with_forms(random_problem(seed, 5), seed)
    plain = plan(problem, 1 << 40, solver="greedy")
    budget = (2 * plain.least_peak + plain.figures.peak) // 3
    proved = solve_exactly(Tables(problem), budget, None, 20.0)
    assert proved.draft is not None
    best = proved.draft.figures.repeated_seconds
    assert proved.bound == pytest.approx(best, abs=1e-6)
    found = plan(problem, budget, seconds=1.0).figures
    assert found.repeated_seconds + problem.seconds <= 1.02 * (best + problem.seconds)


@pytest.mark.parametrize(("seed", "seconds"), [(1, 2.7), (12, 5.2), (18, 6.3)])
def test_the_least_peak_does_not_cost_everything(seed: int, seconds: float) -> None:
    # What ends at the peak may be there before it: giving it up altogether costs several times as
    # much (7.4, 8.5 and 16.6 seconds here).
    problem = random_problem(seed, 12)
    budget = plan(problem, 1 << 40, solver="greedy").least_peak
    found = plan(problem, budget, solver="greedy").figures
    assert found.peak <= budget
    assert found.repeated_seconds <= seconds + 1e-6


@given(seed=st.integers(0, 10_000), data=st.data())
@settings(max_examples=40)
def test_the_compiled_replay_is_the_replay(seed: int, data: st.DataObject) -> None:
    problem = with_forms(random_problem(seed), seed)
    tables = Tables(problem)
    since = tables.blank(())
    for v in tables.free:
        since[v] = data.draw(st.integers(-1 - tables.never, tables.never))
        since[len(problem.sizes) + v] = data.draw(st.sampled_from(problem.ways[int(v)]))
    point = tables.point(since)
    assert point is not None
    figures = tables.draft(point).figures
    assert (figures.peak, figures.saved_bytes) == (point.peak, point.kept)
    assert figures.repeated_seconds == pytest.approx(point.seconds)


@pytest.mark.parametrize("seed", range(6))
def test_smaller_budgets_give_no_larger_peaks_and_bounds_hold(seed: int) -> None:
    problem = random_problem(seed)
    plain = plan(problem, 1 << 40, solver="greedy")
    assert plain.figures.repeated_seconds == 0
    assert plain.saved == problem.keep_all
    peaks = []
    for budget in range(plain.least_peak, plain.figures.peak + 1, 64):
        found = plan(problem, budget, solver="greedy")
        again = replay(problem, found.saved, found.items)
        assert again == found.figures
        assert again.peak <= budget
        assert found.seconds_bound <= again.repeated_seconds
        peaks.append(again.peak)
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("seed", range(6))
def test_bounds_are_below_every_choice(seed: int) -> None:
    problem = random_problem(seed)
    fixed = must_keep(problem)
    free = sorted(sources(problem) - fixed)
    low, _ = least_peak(problem)
    plain = draft(problem, problem.keep_all)
    for count in range(len(free) + 1):
        for kept in combinations(free, count):
            one = draft(problem, closed(problem, fixed | set(kept))).figures
            assert one.peak >= low
            bound = least_seconds(problem, plain.figures.live, one.peak)
            assert bound <= one.repeated_seconds + 1e-9


def test_the_searches_are_never_worse_than_greedy_steps() -> None:
    problem = random_problem(3, length=10)
    plain = plan(problem, 1 << 40, solver="greedy")
    budget = (plain.least_peak + plain.figures.peak) // 2
    greedy = plan(problem, budget, solver="greedy")
    both = plan(problem, budget, seconds=2.0)
    assert both.figures.peak <= budget
    assert both.figures.repeated_seconds <= greedy.figures.repeated_seconds


def test_a_budget_below_the_least_peak_names_what_binds() -> None:
    with pytest.raises(BudgetNotMet, match="no plan needs less than 4, at 'b") as caught:
        plan(chain(6), 3, solver="greedy")
    assert caught.value.code == "memory-budget-too-small"
    assert caught.value.exit_code == 1
    assert "give at least 4 bytes" in str(caught.value.hint)


def test_replay_refuses_orders_that_do_not_work() -> None:
    problem = chain(3)
    items = [Item(i) for i in range(3)]
    with pytest.raises(InternalError, match="reads storage 1, which is gone"):
        replay(problem, {2}, items)
    with pytest.raises(InternalError, match="does not run backward in order"):
        replay(problem, {0, 1, 2}, items[:2])


def test_replay_counts_a_value_from_its_making_to_its_last_use() -> None:
    problem = chain(3)
    everything = replay(problem, {0, 1, 2}, [Item(i) for i in range(3)])
    # Backward of the last step: three values and its gradient.
    assert everything.live == (1, 2, 3, 4, 4, 3)
    again = (Item(0, repeat=True), Item(1, repeat=True), Item(2, repeat=True))
    nothing = replay(problem, (), [*again, *(Item(i) for i in range(3))])
    assert nothing.repeated_seconds == 3.0
    assert nothing.forward_peak == 2


@pytest.mark.parametrize(
    ("text", "value"), [("2GiB", 2**31), ("1.5 MB", 1_500_000), (4096, 4096), ("35%", 0.35)]
)
def test_budgets_are_bytes_or_shares(text: str | int, value: float) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "2 GiBs", "-1", "much", 0, "0%", 0.5])
def test_what_is_no_budget_says_so(text: str | float) -> None:
    with pytest.raises(InputError, match="memory_budget is"):
        parse_bytes(text)
