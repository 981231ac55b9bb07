"""Higher bounds, and better orders, by deciding one thing after another about every order.

At the peak of an order something is alive that need not be, as far as the graph says. Every order
makes it after the peak's operator, or touches it for the last time before, or has it alive there
too: three problems with more edges, in each of which more is known to be alive. The least bound of
all that are left open is a bound for the whole.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from mopt.passes.schedule._order_problem import (
    OrderProblem,
    forced_live,
    peak_of,
)

Edge = tuple[int, int]


@dataclass(frozen=True)
class _Node:
    """What is decided: edges, pairs of a storage and an operator that sees it alive, and of that
    an order with its peak, a bound, and the next thing to decide (None: nothing)."""

    edges: tuple[Edge, ...]
    alive: tuple[tuple[int, int], ...]
    order: list[int]
    peak: int
    bound: int
    next: tuple[int, int] | None


def branch(
    problem: OrderProblem, order: Sequence[int], bound: int, deadline: float
) -> tuple[list[int], int]:
    """The best order found until ``deadline`` (``time.monotonic``), and the bound proved."""
    best = list(order)
    peak = peak_of(problem, best)[0]
    root = _node(problem, best, (), ())
    assert root is not None
    nodes = [replace(root, bound=bound)]
    # The same nodes twice: the least bound proves, the least peak finds better orders.
    by_bound, by_peak = [(bound, 0)], [(peak, 0)]
    left = {0}
    low = bound
    # The least bound of nodes about which nothing more can be decided.
    closed = peak
    for turn in count():
        while by_bound and by_bound[0][1] not in left:
            heapq.heappop(by_bound)
        low = max(low, min([peak, closed, *(bound for bound, _ in by_bound[:1])]))
        if not by_bound or low >= peak or time.monotonic() > deadline:
            return best, low
        waiting = by_peak if turn % 2 else by_bound
        while waiting[0][1] not in left:
            heapq.heappop(waiting)
        number = heapq.heappop(waiting)[1]
        left.remove(number)
        node = nodes[number]
        if node.next is None:
            closed = min(closed, node.bound)
            continue
        for child in _children(problem, node):
            if child.peak < peak:
                best, peak = child.order, child.peak
            if child.bound < peak:
                left.add(len(nodes))
                heapq.heappush(by_bound, (child.bound, len(nodes)))
                heapq.heappush(by_peak, (child.peak, len(nodes)))
                nodes.append(child)
    raise AssertionError("unreachable")


def _children(problem: OrderProblem, node: _Node) -> Iterator[_Node]:
    assert node.next is not None
    s, v = node.next
    makers = [u for u in problem.touchers[s] if s in problem.makes[u]]
    ways: list[tuple[tuple[Edge, ...], tuple[tuple[int, int], ...]]] = [
        (tuple((u, v) for u in makers), ((s, v),)),
    ]
    if makers:
        ways.append((tuple((v, u) for u in makers), ()))
    if s not in problem.kept:
        ways.append((tuple((u, v) for u in problem.touchers[s]), ()))
    for edges, alive in ways:
        # A decision narrows what was known: the bound never falls.
        child = _node(problem, node.order, (*node.edges, *edges), (*node.alive, *alive))
        if child is not None:
            yield replace(child, bound=max(child.bound, node.bound))


def _node(
    problem: OrderProblem, near: Sequence[int], edges: tuple[Edge, ...],
    alive: tuple[tuple[int, int], ...],
) -> _Node | None:  # fmt: skip
    """What follows from decisions; None where no order keeps them."""
    before = [list(earlier) for earlier in problem.before]
    for u, v in edges:
        if u == v:
            return None
        before[v].append(u)
    orders = [o for o in (_repaired(before, near), _repaired_back(before, near)) if o is not None]
    if not orders:
        return None
    order = min(orders, key=lambda o: peak_of(problem, o))
    peak, at = peak_of(problem, order)
    place = {v: i for i, v in enumerate(order)}
    same = _renamed(problem, before, order, place)
    total, counted = forced_live(same, 1)
    for s, v in set(alive):
        if not counted.get(s, 0) >> place[v] & 1:
            total[place[v]] += problem.sizes[s]
    bound = int(total.max(initial=0))
    known = {s for s, v in alive if v == order[at]}
    return _Node(edges, alive, order, peak, bound, _undecided(same, counted, at, order, known))


def _undecided(
    same: OrderProblem, counted: dict[int, int], at: int, order: list[int], known: set[int]
) -> tuple[int, int] | None:
    """The largest storage alive at the peak that need not be, and the operator there."""
    best: tuple[int, int] | None = None
    for s, bits in counted.items():
        if bits >> at & 1 or s in known or not same.sizes[s]:
            continue
        touchers = same.touchers[s]
        starts = s in same.given or min(touchers, default=at + 1) <= at
        ends = s in same.kept or max(touchers, default=-1) >= at
        if starts and ends and (best is None or same.sizes[s] > best[0]):
            best = (same.sizes[s], s)
    return None if best is None else (best[1], order[at])


def _renamed(
    problem: OrderProblem, before: list[list[int]], order: list[int], place: dict[int, int]
) -> OrderProblem:
    """The problem with operators numbered as they run, and the edges of ``before``."""
    return OrderProblem(
        tuple(tuple(sorted({place[u] for u in before[v]})) for v in order),
        tuple(problem.makes[v] for v in order),
        tuple(problem.touches[v] for v in order),
        problem.sizes, problem.kept,
        tuple(problem.needs(v) for v in order),
        tuple(problem.may_take(v) for v in order),
        problem.given,
    )  # fmt: skip


def _repaired(before: list[list[int]], near: Sequence[int]) -> list[int] | None:
    """The order nearest to ``near`` that keeps all edges, late operators waiting; None: a cycle."""
    place = {v: i for i, v in enumerate(near)}
    after: list[list[int]] = [[] for _ in before]
    missing = [len(set(earlier)) for earlier in before]
    for v, earlier in enumerate(before):
        for u in set(earlier):
            after[u].append(v)
    ready = [(place[v], v) for v, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        v = heapq.heappop(ready)[1]
        order.append(v)
        for w in after[v]:
            missing[w] -= 1
            if not missing[w]:
                heapq.heappush(ready, (place[w], w))
    return order if len(order) == len(before) else None


def _repaired_back(before: list[list[int]], near: Sequence[int]) -> list[int] | None:
    """The same from the end: what must run earlier is moved up instead."""
    after: list[list[int]] = [[] for _ in before]
    for v, earlier in enumerate(before):
        for u in earlier:
            after[u].append(v)
    back = _repaired(after, list(reversed(near)))
    return None if back is None else back[::-1]
