"""Plans that repeat and move out: searches at several prices of the link, each put to time.

The price of a second of the link is the multiplier of its one constraint, that transfers share it:
at a high price only what is dear to repeat is moved, at a low price as much as there is. Each
price's plan gets a timetable, whose stalls are what the price only guesses; the cheapest counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mopt.errors import BudgetNotMet
from mopt.passes.checkpoint._bounds import least_seconds
from mopt.passes.checkpoint._link import Timetable, priced, schedule
from mopt.passes.checkpoint._order import Draft
from mopt.recompute import OFFLOAD, RecomputePlan, RecomputeProblem, replay

Solve = Callable[[RecomputeProblem, int], RecomputePlan]

_PRICES = (1.0, 0.3, 0.1, 0.02)
_LEVELS = 64


def plan_with_link(problem: RecomputeProblem, budget: int, solve: Solve) -> RecomputePlan:
    """The cheapest plan within the budget, transfers and what they cannot hide included.

    Budgets are rounded down to levels, and a level takes the plan of the one below where its own
    fits there: a smaller budget gives no larger peak. Raises BudgetNotMet.
    """
    plain = solve(_without(problem), 1 << 62).figures
    step = max(1, (plain.peak - problem.constant) // _LEVELS)
    if budget >= plain.peak:
        return solve(_without(problem), budget)
    level = plain.peak - -(-(plain.peak - budget) // step) * step
    try:
        found = _best(problem, level, solve)
    except BudgetNotMet:
        level, found = budget, _best(problem, budget, solve)
    while found.figures.peak <= level - step:
        level -= step
        try:
            found = _best(problem, level, solve)
        except BudgetNotMet:
            break  # the searches do not find again what they found with more room
    bound = least_seconds(problem, plain.live, budget)
    return replace(found, budget=budget, plain=plain, seconds_bound=min(bound, found.seconds))


def _without(problem: RecomputeProblem) -> RecomputeProblem:
    forward = tuple(replace(c, again=None) if c.form == OFFLOAD else c for c in problem.forward)
    return replace(problem, forward=forward)


def _best(problem: RecomputeProblem, budget: int, solve: Solve) -> RecomputePlan:
    """The cheapest plan of all prices, and of none."""
    candidates = [("", _without(problem))]
    candidates += [(f", link at {p:g}", priced(problem, p)) for p in _PRICES]
    known: list[tuple[tuple[float, int], RecomputePlan]] = []
    failed: list[BudgetNotMet] = []
    for name, one in candidates:
        try:
            found = solve(one, budget)
        except BudgetNotMet as error:
            failed.append(error)
            continue
        figures = replay(problem, found.saved, found.items)
        timetable = schedule(problem, Draft(found.saved, found.items, figures), budget)
        if timetable.draft.figures.peak <= budget:
            known.append(((timetable.seconds, timetable.draft.figures.peak),
                          _timed(found, timetable, name)))  # fmt: skip
    if not known:
        # The one with the link as cheap as can be reaches the least peak.
        raise failed[-1]
    return min(known, key=lambda pair: pair[0])[1]


def _timed(plan: RecomputePlan, timetable: Timetable, name: str) -> RecomputePlan:
    draft = timetable.draft
    return replace(
        plan, saved=draft.saved, items=draft.items, figures=draft.figures,
        settled=timetable.settled, stall_seconds=timetable.stall_seconds,
        solver=plan.solver + name,
    )  # fmt: skip
