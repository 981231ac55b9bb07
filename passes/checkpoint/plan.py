"""The plan for a budget: the cheapest of what greedy steps and the integer program find."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mopt.errors import BudgetNotMet
from mopt.passes.checkpoint._bounds import least_peak, least_seconds
from mopt.passes.checkpoint._greedy import evictions, refill
from mopt.passes.checkpoint._order import Draft, Stages
from mopt.passes.checkpoint._program import facts, solve
from mopt.recompute import RecomputePlan, RecomputeProblem

# Budgets between the least and the plain peak that are told apart; see `_Ladder`.
LEVELS = 64
_MOST_VARIABLES = 3000
_STAGES = 96


def plan(
    problem: RecomputeProblem, budget: int, *, seconds: float = 10.0, solver: str = "auto"
) -> RecomputePlan:
    """What to keep and what to repeat so that the step's peak is within ``budget`` bytes.

    Equal problems give equal plans unless time runs out, and a smaller budget never gives a larger
    peak. ``seconds`` are of this process's CPU, so that a busy machine does not change the plan.
    ``solver`` is ``auto`` or ``greedy``. Raises BudgetNotMet (``memory-budget-too-small``)
    with the least peak that was found and the call that binds.
    """
    started = time.monotonic()
    ladder = _Ladder(problem, seconds, use_program=solver == "auto")
    plain = ladder.pool[0]
    low, low_call = least_peak(problem)
    if budget >= plain.figures.peak:
        best, found_by = plain, "keep-all"
    else:
        if budget < ladder.least:
            ladder.reach_lower(budget)
        if budget < ladder.least:
            raise _too_small(problem, budget, ladder, low, low_call)
        best, found_by = ladder.best(ladder.level_of(budget))
    bound = least_seconds(problem, plain.figures.live, budget)
    return RecomputePlan(
        best.saved, best.items, best.figures, plain.figures, ladder.least, low, budget,
        min(bound, best.figures.repeated_seconds), found_by, time.monotonic() - started,
        tuple(ladder.notes),
    )  # fmt: skip


def _too_small(
    problem: RecomputeProblem, budget: int, ladder: _Ladder, low: int, low_call: str
) -> BudgetNotMet:
    binding = min(ladder.pool, key=lambda d: d.figures.peak).figures.peak_call
    proof = (
        f"no plan needs less than {low:,}, at {low_call!r}"
        if budget < low
        else f"whether less is possible is not known (nothing below {low:,} is)"
    )
    return BudgetNotMet(
        f"a training step does not fit into {budget:,} bytes: the least peak found is "
        f"{ladder.least:,} bytes, at {binding!r}; {proof}. Weights, inputs and incoming gradients "
        f"alone take {problem.constant:,}",
        code="memory-budget-too-small",
        hint=f"give at least {ladder.least} bytes, or make the batch smaller",
    )


@dataclass
class _Ladder:
    """Plans for evenly spaced budgets, so that peaks fall with budgets.

    A budget is rounded down to a level. Where the cheapest plan of a level already fits the next
    lower one, that level's plan is taken instead: peaks of levels therefore never cross. The
    greedy pool does not depend on the budget.
    """

    problem: RecomputeProblem
    seconds: float
    use_program: bool = True
    pool: list[Draft] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _solved: dict[int, tuple[Draft, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stages = Stages.of(self.problem, _STAGES)
        self.pool = evictions(self.problem, self.stages, seconds=max(2.0, self.seconds / 2))
        self.least = min(d.figures.peak for d in self.pool)
        self.most = self.pool[0].figures.peak
        self._until = time.process_time() + self.seconds
        width = len(self.stages.ends)
        about = facts(self.problem, self.stages, width)
        while width > 2 and sum(len(w) for w in about.window.values()) > _MOST_VARIABLES:
            width //= 2
            about = facts(self.problem, self.stages, width)
        self._about = about

    def budget_of(self, level: int) -> int:
        """The bytes of a level: level 0 is the least peak found by greedy steps."""
        return self.least + (self.most - self.least) * level // LEVELS

    def level_of(self, budget: int) -> int:
        """The highest level within a budget."""
        return max(n for n in range(LEVELS + 1) if self.budget_of(n) <= budget)

    def best(self, level: int) -> tuple[Draft, str]:
        """The plan of a level and who found it."""
        if level not in self._solved:
            budget = self.budget_of(level)
            found = self._within(budget)
            if level and found[0].figures.peak <= self.budget_of(level - 1):
                found = self.best(level - 1)
            self._solved[level] = found
        return self._solved[level]

    def _within(self, budget: int) -> tuple[Draft, str]:
        fitting = [d for d in self.pool if d.figures.peak <= budget]
        best, name = min(fitting, key=lambda d: d.cost), "greedy"
        if not self.use_program or time.process_time() > self._until:
            return best, name
        rows = budget
        for _ in range(3):
            left = self._until - time.process_time()
            if left <= 0.5:
                self.notes.append("the time limit ended the search")
                break
            found = solve(
                self.problem, self.stages, self._about, rows, seconds=left / 2,
                below=best.figures.repeated_seconds,
            )  # fmt: skip
            if found is None:
                break
            one, _ = found
            slack = budget - one.figures.peak
            if slack >= 0:
                if one.cost < best.cost:
                    best, name = one, "program"
                if slack <= (self.most - self.least) // (2 * LEVELS):
                    break
                # Rows are not exact within a stage; replay says how far off they were.
            rows += slack
        left = self._until - time.process_time()
        filled = refill(self.problem, best, budget, seconds=min(left, self.seconds / 8))
        if filled.cost < best.cost:
            best, name = filled, f"{name}, refilled"
        return best, name

    def reach_lower(self, budget: int) -> None:
        """Try for a peak below what greedy steps reached."""
        if not self.use_program:
            return
        found = solve(
            self.problem, self.stages, self._about, budget,
            seconds=max(1.0, self._until - time.process_time()),
        )  # fmt: skip
        if found is not None and found[0].figures.peak < self.least:
            self.pool.append(found[0])
            self.least = found[0].figures.peak
