"""What lies in the arena and what beside it: never more than the order needs, and no model of its
own of what is alive."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from mopt.passes.schedule._order_problem import OrderProblem, peak_of
from mopt.passes.schedule._split import Beside, split


def alive(problem: OrderProblem, away: frozenset[int], plain: list[int]) -> tuple[int, int]:
    """Most bytes in the arena and beside it, by running the operators 0, 1, 2 ...

    A block is memory with the side it lies on. Where a result may take over an input that nobody
    touches any more and that lies on its side, it does; results beside the arena are made in the
    way that needs less.
    """
    left = [len(touchers) for touchers in problem.touchers]
    blocks: dict[int, int] = {}
    most = {True: 0, False: 0}
    for v in range(problem.count):
        (made,) = problem.makes[v]
        source = next((s for s in problem.may_take(v) if left[s] == 1 and s not in problem.kept),
                      None)  # fmt: skip
        taken = source is not None and (source in away) == (made in away)
        if not taken:
            blocks[made] = problem.sizes[made]
        workspace = problem.needs(v)
        if made in away and not taken:
            workspace = min(workspace, plain[v])
        for side in (True, False):
            held = sum(size for s, size in blocks.items() if (s in away) == side)
            most[side] = max(most[side], held + (workspace if side else 0))
        if taken:
            blocks[made] = blocks[source] if source is not None else 0
        for s in problem.touches[v]:
            left[s] -= 1
            if not left[s] and s not in problem.kept:
                blocks.pop(s, None)
    return most[False], most[True]


@st.composite
def problems(draw: st.DrawFn) -> tuple[OrderProblem, frozenset[int], list[int]]:
    """A graph in its order, what cannot lie in the arena, and workspaces of plain calls."""
    count = draw(st.integers(1, 9))
    rng = random.Random(draw(st.integers(0, 1 << 16)))
    sizes = [rng.randint(1, 5) for _ in range(count)]
    before = [tuple(sorted(rng.sample(range(v), min(v, rng.randint(1, 2))))) for v in range(count)]
    never = frozenset(s for s in range(count) if rng.random() < 0.2) | {count - 1}
    workspace = [rng.choice([0, 0, 2]) for _ in range(count)]
    plain = [workspace[v] if v in never else rng.choice([0, 0, 3]) for v in range(count)]
    takes = tuple(
        tuple(u for u in before[v] if sizes[u] == sizes[v] and rng.random() < 0.7)
        for v in range(count)
    )
    problem = OrderProblem(
        tuple(before), tuple((v,) for v in range(count)),
        tuple((*before[v], v) for v in range(count)), tuple(sizes), frozenset({count - 1}),
        tuple(workspace), takes,
    )  # fmt: skip
    return problem, never, plain


@settings(max_examples=60)
@given(problems())
def test_no_division_needs_less(case: tuple[OrderProblem, frozenset[int], list[int]]) -> None:
    problem, never, plain = case
    found = split(
        problem, range(problem.count), never_placed=never,
        placed_workspace=[None if v in never and not problem.may_take(v) else problem.needs(v)
                          for v in range(problem.count)],
        plain_workspace=plain,
    )  # fmt: skip
    assert never <= found.storages
    inside, beside = alive(problem, found.storages, plain)
    assert beside == found.peak
    free = sorted(set(range(problem.count)) - never)
    every = (
        sum(alive(problem, never | {s for k, s in enumerate(free) if bits >> k & 1}, plain))
        for bits in range(1 << len(free))
    )
    assert inside + beside == min(every) <= peak_of(problem, range(problem.count))[0]


def test_chains_come_back_into_the_arena_where_that_costs_nothing() -> None:
    # A chain that takes over its own memory, then a large result that is handed out.
    count = 6
    problem = OrderProblem(
        before=tuple((v - 1,) if v else () for v in range(count)),
        makes=tuple((v,) for v in range(count)),
        touches=tuple((v - 1, v) if v else (0,) for v in range(count)),
        sizes=(64,) * (count - 1) + (8,),
        kept=frozenset({count - 1}),
        takes=tuple((v - 1,) if 0 < v < count - 1 else () for v in range(count)),
    )
    none = [0] * count
    found = split(problem, range(count), never_placed=frozenset({count - 1}),
                  placed_workspace=none, plain_workspace=none)  # fmt: skip
    assert found == Beside(frozenset({count - 1}), 8)
