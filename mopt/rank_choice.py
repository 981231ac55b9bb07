"""One option for each of many layers, with the least total loss that a budget allows.

    pick({"a": [Option(10, 5.0), Option(20, 1.0)], "b": [...]}, budget=25)   # {"a": 1, "b": 0}

What the layers cost may be numbers that are stored or milliseconds: the same rule serves both.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """What one form of a layer costs, and what it loses."""

    cost: float
    loss: float


def pick(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, int]:
    """Per layer the number of its option; their costs stay within ``budget`` if any choice does.

    From the cheapest options on, the step that lowers the loss most per cost is taken, along the
    lower convex hull of each layer: the optimum of the relaxed problem, and of the whole one up to
    the last step. What is left of the budget then buys what it still can, off the hulls too.
    """
    hulls = {name: _hull(found) for name, found in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(options[name][at].cost for name, at in chosen.items())
    heap = [entry for name in options if (entry := _step(options[name], hulls[name], name, 0))]
    heapq.heapify(heap)
    while heap:
        _, name, at = heapq.heappop(heap)
        before, after = options[name][chosen[name]], options[name][hulls[name][at]]
        if after.cost - before.cost > left:
            continue
        left -= after.cost - before.cost
        chosen[name] = hulls[name][at]
        following = _step(options[name], hulls[name], name, at)
        if following:
            heapq.heappush(heap, following)
    return _fill(options, chosen, left)


def _hull(found: Sequence[Option]) -> list[int]:
    """The options on the lower convex hull, from the cheapest on."""
    order = sorted(range(len(found)), key=lambda i: (found[i].cost, found[i].loss))
    hull: list[int] = []
    for i in order:
        if hull and found[i].loss >= found[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(found, hull[-2], hull[-1]) >= _slope(found, hull[-2], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(found: Sequence[Option], first: int, second: int) -> float:
    width = found[second].cost - found[first].cost
    return (found[second].loss - found[first].loss) / width if width > 0 else -float("inf")


def _step(
    found: Sequence[Option], hull: list[int], name: str, at: int
) -> tuple[float, str, int] | None:
    if at + 1 >= len(hull):
        return None
    return _slope(found, hull[at], hull[at + 1]), name, at + 1


def _fill(
    options: Mapping[str, Sequence[Option]], chosen: dict[str, int], left: float
) -> dict[str, int]:
    while True:
        best: tuple[float, str, int] | None = None
        for name, found in options.items():
            now = found[chosen[name]]
            for at, one in enumerate(found):
                gain = now.loss - one.loss
                if gain > 0 and one.cost - now.cost <= left and (best is None or gain > best[0]):
                    best = gain, name, at
        if best is None:
            return chosen
        _, name, at = best
        left -= options[name][at].cost - options[name][chosen[name]].cost
        chosen[name] = at
