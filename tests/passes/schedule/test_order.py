"""Orders of operators: known optima, exhaustive search on small graphs, bounds."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopt.passes.schedule._order import best_order
from mopt.passes.schedule._order_branch import branch
from mopt.passes.schedule._order_greedy import candidates
from mopt.passes.schedule._order_problem import (
    OrderProblem,
    Run,
    forced_bound,
    is_order,
    peak_of,
)
from mopt.passes.schedule._order_search import search


def graph(
    edges: list[tuple[int, int]], sizes: list[int], *, workspace: tuple[int, ...] = ()
) -> OrderProblem:
    """One storage for each operator, read along the edges; operators are in a legal order."""
    before = [tuple(sorted({u for u, w in edges if w == v})) for v in range(len(sizes))]
    return OrderProblem(
        before=tuple(before),
        makes=tuple((v,) for v in range(len(sizes))),
        touches=tuple((*before[v], v) for v in range(len(sizes))),
        sizes=tuple(sizes),
        kept=frozenset({len(sizes) - 1}),
        workspace=workspace,
    )


@st.composite
def problems(draw: st.DrawFn, most: int = 8) -> OrderProblem:
    """Small graphs with workspaces and results that may take over an input's memory."""
    count = draw(st.integers(1, most))
    sizes = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    edges = [
        (u, v) for v in range(1, count) for u in draw(st.sets(st.integers(0, v - 1), max_size=3))
    ]
    workspace = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    plain = graph(edges, sizes, workspace=tuple(workspace))
    takes = tuple(
        tuple(u for u in plain.before[v] if sizes[u] == sizes[v] and draw(st.booleans()))
        for v in range(count)
    )
    return OrderProblem(
        plain.before, plain.makes, plain.touches, plain.sizes, plain.kept, plain.workspace, takes
    )


def least_peak(problem: OrderProblem) -> int:
    """The least peak of all orders, by trying them."""
    best = [1 << 60]

    def extend(run: Run, done: frozenset[int]) -> None:
        if run.peak >= best[0]:
            return
        if len(done) == problem.count:
            best[0] = run.peak
        for v in set(range(problem.count)) - done:
            if done.issuperset(problem.before[v]):
                after = run.copy()
                after.run(v)
                extend(after, done | {v})

    extend(Run(problem), frozenset())
    return best[0]


@settings(max_examples=80)
@given(problems())
def test_search_finds_what_trying_everything_finds(problem: OrderProblem) -> None:
    least = least_peak(problem)
    found = search(Run(problem), range(problem.count), 0)
    assert found is not None and is_order(problem, found.order)
    assert found.peak == peak_of(problem, found.order)[0] == least
    result = best_order(problem)
    assert (result.peak, result.lower_bound) == (least, least)
    assert forced_bound(problem) <= least
    assert result.peak <= result.input_peak


@settings(max_examples=60)
@given(problems())
def test_deciding_what_is_alive_ends_at_the_least_peak(problem: OrderProblem) -> None:
    given_order = list(range(problem.count))
    start, least = forced_bound(problem), least_peak(problem)
    order, bound = branch(problem, given_order, start, time.monotonic() + 60)
    assert is_order(problem, order)
    peak = peak_of(problem, order)[0]
    assert start <= bound <= least <= peak <= peak_of(problem, given_order)[0]


def test_deciding_proves_what_forced_values_do_not() -> None:
    proved = forced = 0
    for seed in range(30):
        rng = random.Random(seed)
        edges = [
            (u, v)
            for v in range(1, 9)
            for u in rng.sample(range(v), min(v, rng.choice([0, 1, 1, 2])))
        ]
        problem = graph(edges, [rng.randint(1, 9) for _ in range(9)])
        low, least = forced_bound(problem), least_peak(problem)
        forced += low == least
        order, bound = branch(problem, list(range(9)), low, time.monotonic() + 60)
        proved += bound == least == peak_of(problem, order)[0]
    assert forced < proved == 30


def test_kept_results_bound_every_order() -> None:
    problem = graph([(0, 1), (0, 2)], [5, 4, 3])
    kept = OrderProblem(
        problem.before, problem.makes, problem.touches, problem.sizes, frozenset({1, 2})
    )
    # The last of the two sees the other one and what both read.
    assert forced_bound(kept) == 12 == least_peak(kept)


def test_one_of_a_chain_is_alive_in_every_order() -> None:
    # 1 turns the 10 bytes of 0 into 6, before or after 2 and 3: 6 are alive beside their 21.
    chain = OrderProblem(
        before=((), (0,), (0,), (2,), (1, 3)),
        makes=((0,), (1,), (2,), (3,), (4,)),
        touches=((0,), (0, 1), (2,), (2, 3), (1, 3, 4)),
        sizes=(10, 6, 20, 1, 1),
    )
    assert forced_bound(chain) == least_peak(chain) == 27


@settings(max_examples=80)
@given(problems(most=20))
def test_every_rule_gives_an_order(problem: OrderProblem) -> None:
    for name, order in candidates(problem):
        assert is_order(problem, order), name


def test_known_optima() -> None:
    # A fan of large results, each reduced by a small one: one large result at a time.
    fan = 10
    edges = [(0, 1 + k) for k in range(fan)] + [(1 + k, 1 + fan + k) for k in range(fan)]
    edges += [(1 + fan + k, 1 + 2 * fan) for k in range(fan)]
    reduced = graph(edges, [1] + [100] * fan + [1] * fan + [1])
    assert best_order(reduced).input_peak == 1 + 100 * fan
    # While the last of them is reduced, the input has ended and nine small results are alive.
    assert best_order(reduced).peak == best_order(reduced).lower_bound == 100 + fan
    # Complete binary tree of unit results: depth + 1 pebbles, and one more while a call runs.
    depth = 5
    leaves, tree, level = 1 << depth, [], list(range(1 << depth))
    number = leaves
    while len(level) > 1:
        pairs = list(zip(level[::2], level[1::2], strict=True))
        tree += [(u, number + k) for k, pair in enumerate(pairs) for u in pair]
        level = list(range(number, number + len(pairs)))
        number += len(pairs)
    assert best_order(graph(tree, [1] * number), 0.5).peak == depth + 2


@pytest.mark.parametrize(("count", "width"), [(20, 6), (30, 6), (45, 5)])
def test_irregular_graphs_are_solved_to_proof(count: int, width: int) -> None:
    rng = random.Random(0)
    edges = [
        (u, v)
        for v in range(1, count)
        for u in rng.sample(range(max(0, v - width), v), min(v, rng.randint(1, 3)))
    ]
    problem = graph(edges, [rng.randint(1, 20) for _ in range(count)])
    result = best_order(problem)
    assert result.peak == result.lower_bound < result.input_peak
    assert is_order(problem, result.order)


def test_nothing_to_gain_leaves_the_order_alone() -> None:
    chain = graph([(k, k + 1) for k in range(30)], [4] * 31)
    assert best_order(chain).order == list(range(31))


def test_a_time_limit_is_kept_and_told() -> None:
    rng = random.Random(7)
    count = 400
    edges = [(rng.randrange(max(0, v - 60), v), v) for v in range(1, count) for _ in range(2)]
    result = best_order(graph(edges, [rng.randint(1, 50) for _ in range(count)]), 0.05)
    assert result.seconds < 20
    assert result.timed_out == (result.peak > result.lower_bound)
    assert result.lower_bound <= result.peak <= result.input_peak
