"""Plans of falling peak, and better plans near a given one."""

from __future__ import annotations

import numpy as np

from mopt.passes.checkpoint._kernel import anneal
from mopt.passes.checkpoint._tables import SAVED, Point, Tables

_NO_LIMIT = 1 << 62
_AT_ONCE = 60
# How often a value's end is moved forward before it is given up.
_CUTS = 4


def descend(tables: Tables, work: int, *, kept: bool = False) -> list[Point]:
    """Plans from keeping everything towards keeping the least; ``work`` bounds the touches.

    Each step gives up one of the values that are alive at the peak and cheap for their bytes: the
    one with the fewest seconds more for each byte less, held or not held once it is repeated. With
    ``kept``, the kept bytes fall instead of the peak.
    """
    plain = tables.point(tables.blank(tables.problem.keep_all))
    assert plain is not None
    now = plain
    found = [now]
    tried: set[int] = set()
    sizes = tables.arrays.size
    while work > 0:
        here = tables.free if kept else tables.alive(now)
        here = np.array(
            [v for v in here if now.since[v] == SAVED and sizes[v] and int(v) not in tried],
            np.int64,
        )
        if not len(here):
            break
        rates = tables.prices(now.since, here) / sizes[here]
        places = np.argsort(rates, kind="stable")
        best: tuple[float, Point] | None = None
        # In a large step many at once: one by one would use up the work halfway.
        many = len(here) // _AT_ONCE
        for some in [here[places[:many]]] * (many > 1) + [here[[p]] for p in places[:10]]:
            for since in tables.drops(now.since, some):
                work -= 2 * tables.touches
                one = tables.point(since)
                if one is None:
                    continue
                gain = now.kept - one.kept if kept else now.peak - one.peak
                if gain > 0 and (best is None or (one.seconds - now.seconds) / gain < best[0]):
                    best = (one.seconds - now.seconds) / gain, one
            if many > 1 and best is not None:
                break
        if best is not None:
            now = best[1]
            found.append(now)
            tried.clear()
            continue
        # Nothing helps at once: two peaks are equally high, or the gain needs another step.
        v = here[places[0]]
        tried.add(int(v))
        since = now.since.copy()
        since[v] = 0
        one = tables.point(since)
        if one is not None:
            now = one
    for state in (0, tables.never):
        since = tables.blank(())
        since[tables.free] = state
        one = tables.point(since)
        if one is not None:
            found.append(one)
    return found


def last_ways(tables: Tables) -> list[Point]:
    """Plans that have all values but the last few again, each in the last way that it has.

    Steps from keeping everything do not find a chain of inverses, which pays only as a whole.
    """
    found = []
    count = len(tables.problem.sizes)
    order = sorted(tables.several.tolist(), key=lambda v: tables.problem.maker[v])
    for kept in range(min(5, len(order))):
        for state in (0, tables.never):
            since = tables.blank(())
            since[tables.free] = state
            for place, v in enumerate(order):
                if place >= len(order) - kept:
                    since[v] = SAVED
                else:
                    since[count + v] = tables.problem.ways[v][-1]
            one = tables.point(since)
            if one is not None:
                found.append(one)
    return found


def polish(tables: Tables, start: Point, budget: int, work: int) -> Point:
    """A plan within the budget that repeats fewer seconds, by single steps and exchanges.

    What costs most seconds is kept again, if need be in exchange for something cheaper.
    """
    now = start
    sizes = tables.arrays.size
    better = True
    while better and work > 0:
        better = False
        gone = tables.free[now.since[tables.free] > SAVED]
        gone = gone[sizes[gone] > 0]
        rates = tables.prices(now.since, gone) / sizes[gone]
        for v in gone[np.argsort(-rates, kind="stable")]:
            if work <= 0:
                break
            since = now.since.copy()
            since[v] = SAVED
            one, spent = _fit(tables, since, int(v), now, budget)
            work -= spent
            if one is None or one.cost >= now.cost:
                one, spent = _keep_until(tables, since, int(v), now, budget)
                work -= spent
            if one is not None and one.cost < now.cost:
                now, better = one, True
        for v in gone:
            if work <= 0:
                break
            if now.since[v] == SAVED:
                continue
            for since in tables.drops(now.since, [v]):
                one = tables.point(since)
                work -= 2 * tables.touches
                if one is not None and one.peak <= budget and one.cost < now.cost:
                    now, better = one, True
    return now


def _fit(
    tables: Tables, since: np.ndarray, wanted: int, now: Point, budget: int
) -> tuple[Point | None, int]:
    """The plan with ``wanted`` kept, and where it does not fit the best single exchange for it."""
    one = tables.point(since)
    spent = 2 * tables.touches
    if one is None or one.peak <= budget:
        return one, spent
    over = one.peak - budget
    here = tables.alive(one)
    here = here[(one.since[here] == SAVED) & (here != wanted)]
    here = here[tables.arrays.size[here] >= over]
    if not len(here):
        return None, spent
    costs = tables.prices(one.since, here)
    best: Point | None = None
    for u in here[np.argsort(costs, kind="stable")[:4]]:
        for other in tables.drops(one.since, [u]):
            found = tables.point(other)
            spent += 2 * tables.touches
            if found is not None and found.peak <= budget and found.cost < now.cost:
                best = found if best is None or found.cost < best.cost else best
    return best, spent


def _keep_until(
    tables: Tables, since: np.ndarray, wanted: int, now: Point, budget: int
) -> tuple[Point | None, int]:
    """A cheaper plan that has ``wanted`` from forward up to where the budget ends, and again.

    Gradients pile up while backward runs: what does not fit at its end does earlier, and a value
    that is there for the first repetitions spares them. ``since`` keeps it to its end.
    """
    spent = 0
    trial = since.copy()
    for _ in range(_CUTS):
        one = tables.point(trial)
        spent += 2 * tables.touches
        if one is None:
            break
        if one.peak <= budget:
            return (one if one.cost < now.cost else None), spent
        until = tables.backward_call(one) - 1
        if until < 0 or (trial[wanted] < SAVED and -2 - trial[wanted] <= until):
            break
        trial[wanted] = -2 - until
    return None, spent


def shake(
    tables: Tables, start: Point, budget: int, work: int, *, kept: int = _NO_LIMIT, seed: int = 1
) -> Point | None:
    """A plan within the budget (and within ``kept`` bytes) by annealing from ``start``.

    None where no plan within the limits was seen; the same arguments give the same plan.
    """
    steps = max(10, work // (3 * tables.touches))
    if not len(tables.free):
        return start if start.peak <= budget and start.kept <= kept else None
    again = tables.arrays.again_seconds[tables.arrays.remake[tables.free]]
    scale = float(again.mean()) + 1e-12
    size = max(1.0, float(tables.arrays.size[tables.free].mean()))
    best = start.since.copy()
    seconds = anneal(
        tables.arrays, start.since, tables.free, tables.several, tables.last,
        np.array([budget, kept], np.int64), scale, 4 * scale / size, steps, seed,
        tables.items, best,
    )  # fmt: skip
    return tables.point(best) if seconds >= 0 else None
