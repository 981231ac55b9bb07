"""Two quick solutions of the choice that share no code with the solver: start and check for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mopt.passes.choose._program import SLACK, Problem

_ROUNDS = 200
_REPAIRS = 6
_MOVES_PER_GROUP = 40


def greedy(problem: Problem) -> tuple[int, ...] | None:
    """Start from the least objective, buy back the limits where that is cheapest, then improve."""
    start = [int(np.argmin(row)) for row in problem.table(problem.minimize)]
    return improve(problem, start)


def lagrangian(problem: Problem) -> tuple[tuple[int, ...] | None, float]:
    """Price the limits by subgradient steps; the best repaired choice and the best lower bound.

    For prices p >= 0 the minimum of ``objective + p (amounts - limits)`` falls apart into groups
    and is never above the optimum (Everett 1963). Pairs are left out of the prices; with pairs the
    bound is minus infinity where one could lower it.
    """
    quantities = [q for q in problem.limits if np.isfinite(problem.limits[q])]
    objective = problem.table(problem.minimize)
    tables = [problem.table(q) for q in quantities]
    scales = np.array([problem.scale(q) for q in quantities])
    limits = np.array([problem.limits[q] for q in quantities])
    prices = np.zeros(len(quantities))
    unit = problem.scale(problem.minimize)
    best: tuple[int, ...] | None = None
    best_value, bound = np.inf, -np.inf
    rows = np.arange(len(problem.groups))
    seen: set[tuple[int, ...]] = set()
    for step in range(_ROUNDS):
        mixed = objective.copy()
        for price, table in zip(prices, tables, strict=True):
            mixed += np.where(np.isfinite(table), price * np.where(np.isfinite(table), table, 0), 0)
        picked = np.argmin(mixed, axis=1)
        value = float(mixed[rows, picked].sum() - prices @ limits)
        bound = max(bound, value)
        choice = tuple(int(i) for i in picked)
        if choice not in seen and len(seen) < _REPAIRS:
            seen.add(choice)
            repaired = improve(problem, list(choice))
            if repaired is not None:
                found = problem.total(repaired, problem.minimize)
                if found < best_value:
                    best, best_value = repaired, found
        if not quantities:
            break
        over = np.array([table[rows, picked].sum() for table in tables]) - limits
        prices = np.maximum(prices + unit / scales * (over / scales) * 4 / (1 + step) ** 0.7, 0)
    if any(amount < 0 for pair in problem.pairs for amount in pair.amounts.values()):
        bound = -np.inf
    return best, bound


def improve(problem: Problem, choice: list[int]) -> tuple[int, ...] | None:
    """Single moves until none helps: first towards the limits, then down the objective.

    None when single moves do not reach a choice within the limits.
    """
    state = _State(problem, choice)
    limit = _MOVES_PER_GROUP * max(len(choice), 1)
    for _ in range(limit):
        if state.violation() == 0 or not state.move_inside():
            break
    if state.violation() > 0:
        return None
    for _ in range(limit):
        if not state.move_down():
            break
    return tuple(state.choice)


class _State:
    """A choice with its sums, and the effect of every single move on them."""

    def __init__(self, problem: Problem, choice: Sequence[int]) -> None:
        self.problem = problem
        self.choice = list(choice)
        self._objective = problem.table(problem.minimize)
        self._names = list(problem.limits)
        self._tables = {q: problem.table(q) for q in {*self._names, problem.minimize}}
        self._scales = {q: problem.scale(q) for q in self._names}
        self._unit = problem.scale(problem.minimize)
        self._rows = np.arange(len(choice))
        self._totals = {q: problem.total(self.choice, q) for q in self._tables}

    def violation(self) -> float:
        """The sum of all excesses, each relative to its quantity's scale."""
        return sum(
            over / self._scales[q] for q in self._names
            if (over := self._totals[q] - self.problem.limits[q]) > self._slack(q)
        )  # fmt: skip

    def _slack(self, quantity: str) -> float:
        return SLACK * max(abs(self.problem.limits[quantity]), self._scales[quantity])

    def _changes(self, quantity: str) -> np.ndarray:
        """What each move adds to a quantity; not a number where there is no such candidate."""
        table = self._tables[quantity]
        change = table - table[self._rows, self.choice][:, None]
        change = np.where(np.isfinite(change), change, np.nan)
        for pair in self.problem.pairs:
            amount = pair.amount(quantity)
            if amount:
                self._add_pair(change, pair.one, pair.one_candidate, pair.other,
                               pair.other_candidate, amount)  # fmt: skip
                self._add_pair(change, pair.other, pair.other_candidate, pair.one,
                               pair.one_candidate, amount)  # fmt: skip
        return change

    def _add_pair(
        self, change: np.ndarray, row: int, column: int, other: int, wanted: int, amount: float
    ) -> None:
        if self.choice[other] != wanted:
            return
        if self.choice[row] == column:
            change[row] -= amount
            change[row, column] += amount
        else:
            change[row, column] += amount

    def _violations(self) -> np.ndarray:
        """The violation after each move."""
        result = np.zeros_like(self._objective)
        for q in self._names:
            after = self._totals[q] + self._changes(q) - self.problem.limits[q]
            result += np.where(after > self._slack(q), after, 0) / self._scales[q]
        return result

    def move_inside(self) -> bool:
        """The move that lowers the violation most per objective; False if none lowers it."""
        now = self.violation()
        gain = now - self._violations()
        price = np.maximum(self._changes(self.problem.minimize), 0) / self._unit
        worth = np.where(gain > 1e-12, gain / (price + 1e-6), -np.inf)
        return self._take(np.where(np.isnan(worth), -np.inf, worth))

    def move_down(self) -> bool:
        """The move within the limits that lowers the objective most; False if there is none."""
        gain = -self._changes(self.problem.minimize)
        smallest = 1e-12 * self._unit
        allowed = (self._violations() <= 0) & (gain > smallest)
        return self._take(np.where(allowed, gain, -np.inf))

    def _take(self, worth: np.ndarray) -> bool:
        if not worth.size or not np.isfinite(worth.max()):
            return False
        row, column = np.unravel_index(int(np.argmax(worth)), worth.shape)
        for quantity in self._totals:
            self._totals[quantity] += float(self._changes(quantity)[row, column])
        self.choice[int(row)] = int(column)
        return True
