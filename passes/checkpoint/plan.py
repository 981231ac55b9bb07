"""The plan for a budget: the cheapest of what several searches find."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from mopt.errors import BudgetNotMet
from mopt.passes.checkpoint._blocks import cut, with_options
from mopt.passes.checkpoint._bounds import least_peak, least_seconds
from mopt.passes.checkpoint._chain import Chain
from mopt.passes.checkpoint._exact import small_enough, solve_exactly
from mopt.passes.checkpoint._link_prices import plan_with_link
from mopt.passes.checkpoint._order import Draft
from mopt.passes.checkpoint._search import descend, last_ways, polish, shake
from mopt.passes.checkpoint._tables import Point, Tables
from mopt.recompute import OFFLOAD, RecomputePlan, RecomputeProblem

# Budgets between the least and the plain peak that are told apart; see `_Ladder`.
LEVELS = 64
_BLOCKS = 100
_EXACT_SECONDS = 20.0
# Touches of storages that the search replays in a CPU second, more or less.
_TOUCHES = 60_000_000


def plan(
    problem: RecomputeProblem, budget: int, *, seconds: float = 10.0, solver: str = "auto"
) -> RecomputePlan:
    """What to keep and what to repeat so that the step's peak is within ``budget`` bytes.

    Equal problems give equal plans, and a smaller budget never gives a larger peak. ``seconds`` is
    about how long the search takes on an ordinary core: work is counted, not time, so that a busy
    machine does not change the plan. ``solver`` is ``auto``, ``greedy`` or ``exact`` (an integer
    program that proves its plan, for small steps). Raises BudgetNotMet
    (``memory-budget-too-small``) with the least peak that was found and the call that binds.
    """
    if problem.link is None or not any(call.form == OFFLOAD for call in problem.forward):
        return _plan(problem, budget, seconds, solver)
    started = time.monotonic()
    found = plan_with_link(problem, budget, partial(_plan, seconds=seconds / 5, solver=solver))
    return replace(found, solve_seconds=time.monotonic() - started)


def _plan(problem: RecomputeProblem, budget: int, seconds: float, solver: str) -> RecomputePlan:
    started = time.monotonic()
    ladder = _Ladder(Tables(problem), seconds, solver)
    plain = ladder.pool[0]
    low, low_call = least_peak(problem)
    best: Point | Draft
    bound = 0.0
    if budget >= plain.peak:
        best, found_by = plain, "keep-all"
    else:
        if budget < ladder.least.peak:
            ladder.squeeze(budget)
        found = ladder.best(ladder.level_of(budget))
        if found is None and budget >= ladder.least.peak:
            found = ladder.last()
        if found is None:
            raise _too_small(problem, budget, ladder, low, low_call)
        best, found_by = found
        if solver == "exact" or (solver == "auto" and small_enough(ladder.tables)):
            limit = ladder.budget_of(ladder.level_of(budget))
            proved = solve_exactly(ladder.tables, int(limit), best, _EXACT_SECONDS + seconds)
            bound = proved.bound
            if proved.draft is not None and proved.draft.cost < best.cost:
                best, found_by = proved.draft, "exact program"
    figures = ladder.tables.draft(plain).figures
    chosen = best if isinstance(best, Draft) else ladder.tables.draft(best)
    bound = max(bound, least_seconds(problem, figures.live, budget))
    # Solvers' tolerances are no gap.
    if bound >= chosen.figures.repeated_seconds * (1 - 1e-6):
        bound = chosen.figures.repeated_seconds
    return RecomputePlan(
        chosen.saved, chosen.items, chosen.figures, figures, ladder.least.peak, low, budget,
        min(bound, chosen.figures.repeated_seconds), found_by, time.monotonic() - started,
        tuple(ladder.notes),
    )  # fmt: skip


def _too_small(
    problem: RecomputeProblem, budget: int, ladder: _Ladder, low: int, low_call: str
) -> BudgetNotMet:
    least = ladder.tables.draft(ladder.least).figures
    proof = (
        f"no plan needs less than {low:,}, at {low_call!r}"
        if budget < low
        else f"whether less is possible is not known (nothing below {low:,} is)"
    )
    return BudgetNotMet(
        f"a training step does not fit into {budget:,} bytes: the least peak found is "
        f"{least.peak:,} bytes, at {least.peak_call!r}; {proof}. Weights, inputs and incoming "
        f"gradients alone take {problem.constant:,}",
        code="memory-budget-too-small",
        hint=f"give at least {ladder.least.peak} bytes, or make the batch smaller",
    )


_Found = tuple[Point, str]


@dataclass
class _Ladder:
    """Plans for evenly spaced budgets, so that peaks fall with budgets.

    A budget is rounded down to a level. Where the plan of a level already fits the next lower one,
    that level's plan is taken instead: peaks of levels therefore never cross. What is found for a
    level depends on the level alone.
    """

    tables: Tables
    seconds: float
    solver: str = "auto"
    pool: list[Point] = field(default_factory=list)
    others: list[Point] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _solved: dict[int, _Found | None] = field(default_factory=dict)
    _chain: Chain | None = None

    def __post_init__(self) -> None:
        tables, problem = self.tables, self.tables.problem
        self.work = int(self.seconds * _TOUCHES)
        self.pool = descend(tables, self.work // 4)
        self.others = last_ways(tables)
        self.least = min([*self.pool, *self.others], key=lambda p: p.peak)
        self.most = self.pool[0].peak
        grain = math.gcd(*problem.sizes) or 1
        self.step = max((self.most - problem.constant) / LEVELS, float(grain))
        if self.solver == "auto":
            blocks, different = with_options(cut(problem, _BLOCKS), self.work // 8)
            if len(blocks) > 2:
                self._chain = Chain(tables, blocks, self.most)
                self.notes.append(f"{len(blocks)} blocks, {different} different")

    def budget_of(self, level: int) -> float:
        """The bytes of a level; level 0 is the plain step."""
        return self.most - level * self.step

    def level_of(self, budget: int) -> int:
        """The first level within a budget."""
        return max(0, math.ceil((self.most - budget) / self.step - 1e-9))

    def best(self, level: int) -> _Found | None:
        """The plan of a level and who found it; None: no plan."""
        if level not in self._solved:
            found = self._within(int(self.budget_of(level)))
            if found is not None and found[0].peak <= self.budget_of(level + 1):
                found = self.best(level + 1) or found
            elif found is not None and self.budget_of(level + 1) < self.least.peak:
                found = min(found, self._bottom, key=lambda one: one[0].cost)
            self._solved[level] = found
        return self._solved[level]

    def last(self) -> _Found:
        """The plan for budgets from the least peak up to the first level that has a plan."""
        above = self.best(max(0, self.level_of(self.least.peak) - 1))
        if above is not None and above[0].peak <= self._bottom[0].peak:
            return above
        return self._bottom

    @cached_property
    def _bottom(self) -> _Found:
        """The best plan within the least peak."""
        return self._within(self.least.peak) or (self.least, "greedy")

    def _within(self, budget: int) -> _Found | None:
        tables = self.tables
        starts = [(p, "greedy") for p in self.pool if p.peak <= budget]
        starts = [min(starts, key=lambda s: s[0].cost)] if starts else []
        others = [(p, "last ways") for p in self.others if p.peak <= budget]
        starts += [min(others, key=lambda s: s[0].cost)] if others else []
        if self.solver == "greedy":
            done = [(polish(tables, p, budget, self.work // 8), name) for p, name in starts]
            return min(done, key=lambda s: s[0].cost) if done else None
        chained = self._chained(budget)
        if chained is not None:
            starts.append((chained, "chain"))
        if not starts:
            return None
        drawn = [(polish(tables, p, budget, self.work // 12), name) for p, name in starts]
        best, name = min(drawn, key=lambda s: s[0].cost)
        shaken = shake(tables, best, budget, self.work // 4)
        if shaken is not None and shaken.cost < best.cost:
            best, name = polish(tables, shaken, budget, self.work // 12), f"{name}, annealed"
        return best, name

    def _chained(self, budget: int) -> Point | None:
        """The chain's best plan whose replayed peak fits.

        The chain's figures are coarse; the budget it is given is moved by what replay says.
        """
        if self._chain is None:
            return None
        rows, best = budget, None
        for _ in range(5):
            since = self._chain.plan(rows)
            point = None if since is None else self.tables.point(since)
            if point is None:
                break
            slack = budget - point.peak
            if slack >= 0 and (best is None or point.cost < best.cost):
                best = point
            if 0 <= slack <= self.step:
                break
            rows += slack
        return best

    def squeeze(self, budget: int) -> None:
        """Try for a peak below what greedy steps reached."""
        if self.solver == "greedy":
            return
        for target in (budget, (budget + self.least.peak) // 2):
            options = [
                self._chained(target),
                shake(self.tables, self.least, target, self.work // 4),
            ]
            found = [p for p in options if p is not None and p.peak < self.least.peak]
            if found:
                self.least = min(found, key=lambda p: p.peak)
                self.pool.append(self.least)
