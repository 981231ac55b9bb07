"""A cheap family of plans from keeping everything to keeping the least: start and check."""

from __future__ import annotations

import time

from mopt.passes.checkpoint._order import Draft, Stages, closed, draft, must_keep
from mopt.recompute import RecomputeProblem


def evictions(
    problem: RecomputeProblem, stages: Stages, *, seconds: float, target: int = 0
) -> list[Draft]:
    """Plans of falling peak: what costs least time per byte at the peak is given up first.

    Each step gives up one value that is alive at the peak and prices it with everything that has
    to be computed again for it. Stops at ``target`` bytes, when nothing helps, or out of time.
    """
    until = time.process_time() + seconds
    free = problem.results & frozenset(problem.remakes)
    fixed = must_keep(problem) | (free & frozenset(problem.needed))
    now = draft(problem, problem.keep_all | fixed)
    found = [now]
    tried: set[int] = set()
    while now.figures.peak > target and time.process_time() < until:
        order = sorted(
            (s for s in now.saved - fixed - tried if problem.sizes[s]),
            key=lambda s: _price(problem, now.saved, s) / problem.sizes[s],
        )
        better = None
        for s in order[:4]:
            kept = closed(problem, now.saved - {s})
            options = [draft(problem, kept), draft(problem, kept, stages)]
            for one in options:
                gain = now.figures.peak - one.figures.peak
                if gain > 0:
                    price = (one.figures.repeated_seconds - now.figures.repeated_seconds) / gain
                    if better is None or price < better[0]:
                        better = (price, one)
        if better is not None:
            now = better[1]
            found.append(now)
            tried.clear()
            continue
        if not order:
            break
        # Nothing helps at once: two peaks are equally high, or the gain needs another step.
        s = order[0]
        tried.add(s)
        now = draft(problem, closed(problem, now.saved - {s}))
    found += [draft(problem, closed(problem, fixed), how) for how in (None, stages)]
    return found


def _price(problem: RecomputeProblem, saved: frozenset[int], wanted: int) -> float:
    """Seconds to have a value again, with all that is not kept either."""
    total, stack, seen = 0.0, [wanted], set[int]()
    while stack:
        index = problem.remakes.get(stack.pop())
        if index is None or index in seen:
            continue
        seen.add(index)
        again = problem.forward[index].again
        assert again is not None
        total += again.seconds
        stack.extend(u for u in again.reads if u not in saved and u not in problem.given)
    return total


def refill(problem: RecomputeProblem, start: Draft, budget: int, *, seconds: float) -> Draft:
    """Keep more of what is repeated as long as the replayed peak allows: best time per byte first.

    Only for plans whose repeated values stay until their last use.
    """
    until = time.process_time() + seconds
    now = start
    repeated = {item.index for item in now.items if item.repeat}
    values = [
        s for index in repeated for s in problem.forward[index].makes
        if s not in now.saved and problem.sizes[s]
    ]  # fmt: skip
    values.sort(key=lambda s: _price(problem, now.saved, s) / problem.sizes[s], reverse=True)
    for s in values:
        if time.process_time() > until:
            break
        other = draft(problem, closed(problem, now.saved | {s}))
        if other.figures.peak <= budget and other.cost < now.cost:
            now = other
    return now
