"""Solving a choice: HiGHS through PuLP, with heuristics as start and as check."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pulp

from mopt.passes.choose._heuristics import greedy, improve, lagrangian
from mopt.passes.choose._program import QUANTITIES, Pair, Problem, Solution

GAP = 1e-3
# Smaller duals, in units of both scales, are rounding of the linear solver.
_NO_PRICE = 1e-7
# A solution that exceeds a limit by what HiGHS tolerates by itself (1e-6) would be no solution.
_FEASIBLE = 1e-9


def solve(problem: Problem, *, gap: float = GAP, seconds: float = 60.0) -> Solution:
    """The best choice within ``gap``, or the nearest one where the limits cannot all be met.

    The order of groups does not matter; equal problems give equal answers unless time ran out.
    """
    started = time.monotonic()
    order = sorted(range(len(problem.groups)), key=lambda i: problem.groups[i].name)
    found = _solve_sorted(_reordered(problem, order), gap, seconds)
    choice = [0] * len(order)
    for place, index in enumerate(order):
        choice[index] = found.choice[place]
    return replace(found, choice=tuple(choice), seconds=time.monotonic() - started)


def settle(
    problem: Problem, solution: Solution, within: float, *, seconds: float = 60.0
) -> Solution:
    """Of choices that lose as little ``within`` a share, the fastest, and of those the smallest.

    Status, bound and prices stay those of the least loss.
    """
    if problem.minimize != "loss" or solution.excess or not problem.groups:
        return solution
    limits = dict(problem.limits)
    limits["loss"] = min(solution.objective + within, limits.get("loss", math.inf))
    for second in ("latency", "size"):
        amounts = problem.table(second)
        if not (amounts[:, 1:] < amounts[:, :1]).any():
            continue
        found = solve(replace(problem, minimize=second, limits=limits), seconds=seconds)
        if not found.excess and found.totals[second] < solution.totals[second]:
            solution = replace(
                solution, choice=found.choice, totals=found.totals,
                objective=found.totals["loss"], seconds=solution.seconds + found.seconds,
            )  # fmt: skip
        most = solution.totals[second] + GAP * abs(solution.totals[second])
        limits[second] = min(most, limits.get(second, math.inf))
    return solution


def _reordered(problem: Problem, order: Sequence[int]) -> Problem:
    place = {index: new for new, index in enumerate(order)}
    pairs = [replace(p, one=place[p.one], other=place[p.other]) for p in problem.pairs]
    return replace(
        problem, groups=tuple(problem.groups[i] for i in order),
        pairs=tuple(sorted(pairs, key=lambda p: (p.one, p.other, p.one_candidate))),
    )  # fmt: skip


def _solve_sorted(problem: Problem, gap: float, seconds: float) -> Solution:
    if not problem.groups:
        return _finish(problem, (), "optimal", 0.0, {}, {})
    first = greedy(problem)
    second, lagrangian_bound = lagrangian(problem)
    known = [choice for choice in (first, second) if choice is not None]
    start = min(known, key=lambda c: problem.total(c, problem.minimize), default=None)
    checks = {
        "greedy": problem.total(first, problem.minimize) if first else None,
        "lagrangian": problem.total(second, problem.minimize) if second else None,
    }
    model = _Model(problem, start)
    prices = model.prices()
    outcome = model.solve(start, gap, seconds)
    if outcome is None and start is None:
        return _nearest(problem, seconds, checks)
    if outcome is not None:
        choice, status, bound = outcome
    else:
        assert start is not None
        choice, status, bound = start, "time", lagrangian_bound
    if start is not None and problem.total(start, problem.minimize) < problem.total(
        choice, problem.minimize
    ):
        choice = start
    return _finish(problem, choice, status, max(bound, lagrangian_bound), prices, checks)


def _finish(
    problem: Problem,
    choice: Sequence[int],
    status: str,
    bound: float,
    prices: Mapping[str, float],
    checks: Mapping[str, float | None],
) -> Solution:
    choice = _polish(problem, improve(problem, list(choice)) or tuple(choice))
    objective = problem.total(choice, problem.minimize)
    return Solution(
        tuple(choice), status, objective, min(bound, objective), problem.totals(choice),
        prices, checks=checks,
    )  # fmt: skip


def _polish(problem: Problem, choice: Sequence[int]) -> list[int]:
    """No group keeps a candidate that another is no worse than in everything, better in one.

    The objective and the limits say nothing about other quantities, so a solver leaves those to
    chance. What a group adds in pairs with the others as chosen counts as its own.
    """
    polished = list(choice)
    for row, group in enumerate(problem.groups):
        pairs = problem.pairs_of(row)
        for index in range(len(group.candidates)):
            kept = _own(problem, pairs, polished, row, polished[row])
            found = _own(problem, pairs, polished, row, index)
            changes = [now - before for now, before in zip(found, kept, strict=True)]
            if all(change <= 0 for change in changes) and any(change < 0 for change in changes):
                polished[row] = index
    return polished


def _own(
    problem: Problem, pairs: Sequence[Pair], choice: Sequence[int], row: int, index: int
) -> list[float]:
    """Every quantity that a group takes with a candidate, the others being as chosen."""
    varied = [*choice[:row], index, *choice[row + 1 :]] if pairs else []
    taken = [pair for pair in pairs if pair.is_taken(varied)]
    candidate = problem.groups[row].candidates[index]
    return [candidate.amount(q) + sum(pair.amount(q) for pair in taken) for q in QUANTITIES]


def _nearest(problem: Problem, seconds: float, checks: Mapping[str, float | None]) -> Solution:
    """The choice with the least excess, relative to the limits, and what each limit could be."""
    alone = {}
    for quantity in problem.limits:
        single = _Model(replace(problem, minimize=quantity, limits={})).solve(None, 0.0, seconds)
        if single is not None:
            alone[quantity] = problem.total(single[0], quantity)
    outcome = _Model(problem, elastic=True).solve(None, GAP, seconds)
    assert outcome is not None  # every choice is feasible there
    choice = outcome[0]
    return Solution(
        tuple(choice), "infeasible", problem.total(choice, problem.minimize), float("-inf"),
        problem.totals(choice), excess=problem.excess(choice), alone=alone, checks=checks,
    )  # fmt: skip


class _Model:
    """The linear program: a binary per candidate, a row per group and limit, scaled to about 1.

    ``elastic`` lets limits be exceeded and minimizes the sum of relative excesses.
    """

    def __init__(
        self, problem: Problem, start: Sequence[int] | None = None, *, elastic: bool = False
    ) -> None:
        self.problem = problem
        self._elastic = elastic
        # Losses span many orders of magnitude: a solution's own size keeps the solver's
        # tolerances small beside the objective.
        known = abs(problem.total(start, problem.minimize)) if start else 0.0
        self._unit = 1.0 if elastic else known or problem.scale(problem.minimize)
        self._build(relaxed=False)

    def _build(self, *, relaxed: bool) -> None:
        problem = self.problem
        kind = pulp.LpContinuous if relaxed else pulp.LpBinary
        self.lp = pulp.LpProblem("choice", pulp.LpMinimize)
        self.x = [
            [self.lp.add_variable(f"x_{g}_{c}", 0, 1, kind) for c in range(len(group.candidates))]
            for g, group in enumerate(problem.groups)
        ]
        self._pairs: list[tuple[Pair, pulp.LpVariable]] = []
        for number, pair in enumerate(problem.pairs):
            one = self.x[pair.one][pair.one_candidate]
            other = self.x[pair.other][pair.other_candidate]
            both = self.lp.add_variable(f"y_{number}", 0, 1)
            # Either side alone is enough for amounts of one sign, which the optimum pushes to it.
            if any(amount > 0 for amount in pair.amounts.values()):
                self.lp += both >= one + other - 1
            if any(amount < 0 for amount in pair.amounts.values()):
                self.lp += both <= one
                self.lp += both <= other
            self._pairs.append((pair, both))
        excess = self._excess_variables() if self._elastic else {}
        if self._elastic:
            self.lp += pulp.lpSum(excess.values())
        else:
            self.lp += self._sum(problem.minimize, self._unit)
        for row in self.x:
            self.lp += pulp.lpSum(row) == 1
        for quantity, limit in problem.limits.items():
            scale = problem.scale(quantity)
            total = self._sum(quantity, scale)
            if quantity in excess:
                total = total - excess[quantity] * (abs(limit) or scale) / scale
            self.lp += total <= limit / scale, f"limit_{quantity}"

    def _excess_variables(self) -> dict[str, pulp.LpVariable]:
        return {q: self.lp.add_variable(f"over_{q}", 0) for q in self.problem.limits}

    def _sum(self, quantity: str, scale: float) -> pulp.LpAffineExpression:
        terms = [
            (variable, candidate.amount(quantity) / scale)
            for row, group in zip(self.x, self.problem.groups, strict=True)
            for variable, candidate in zip(row, group.candidates, strict=True)
        ]
        terms += [
            (both, pair.amount(quantity) / scale) for pair, both in self._pairs
            if pair.amount(quantity)
        ]  # fmt: skip
        return pulp.LpAffineExpression(terms)

    def solve(
        self, start: Sequence[int] | None, gap: float, seconds: float
    ) -> tuple[tuple[int, ...], str, float] | None:
        """Choice, status and proved bound; None where no choice meets the limits."""
        solver = _WarmHighs(
            self._start_values(start), msg=False, gapRel=gap,
            gapAbs=0.0, threads=1, timeLimit=seconds,
            random_seed=0, mip_feasibility_tolerance=_FEASIBLE,
            primal_feasibility_tolerance=_FEASIBLE,
        )  # fmt: skip
        self.lp.solve(solver)
        # Not .status: PuLP calls an incumbent found when time was up "Optimal" there.
        state = self.lp.sol_status
        if state not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None
        choice = tuple(
            max(range(len(row)), key=[one.varValue or 0.0 for one in row].__getitem__)
            for row in self.x
        )
        if not self._elastic and self.problem.excess(choice):
            return None
        status = "optimal" if state == pulp.LpSolutionOptimal else "time"
        bound = self.lp.solverModel.getInfo().mip_dual_bound * self._unit
        return choice, status, bound

    def _start_values(self, start: Sequence[int] | None) -> dict[str, float]:
        if start is None:
            return {}
        return {
            variable.name: float(index == start[g])
            for g, row in enumerate(self.x)
            for index, variable in enumerate(row)
        }

    def prices(self) -> dict[str, float]:
        """What one more unit of each limit takes off the objective, by the linear relaxation."""
        if not self.problem.limits:
            return {}
        self._build(relaxed=True)
        self.lp.solve(pulp.HiGHS(mip=False, msg=False, threads=1, random_seed=0))
        found = {}
        if self.lp.sol_status == pulp.LpSolutionOptimal:
            for quantity in self.problem.limits:
                row = self.lp.get_constraint_by_name(f"limit_{quantity}")
                dual = -(row.pi or 0.0)
                unit = self._unit / self.problem.scale(quantity)
                found[quantity] = dual * unit if dual > _NO_PRICE else 0.0
        self._build(relaxed=False)
        return found


class _WarmHighs(pulp.HiGHS):
    """PuLP's HiGHS with a first solution, which PuLP does not pass on."""

    def __init__(self, values: Mapping[str, float], **options: object) -> None:
        super().__init__(**options)
        self._values = values

    def callSolver(self, lp: pulp.LpProblem) -> None:
        if self._values:
            import highspy

            found = highspy.HighsSolution()
            # Pair variables that are left at zero are set by HiGHS, which completes a partial one.
            found.col_value = [self._values.get(v.name, 0.0) for v in lp.variables()]
            lp.solverModel.setSolution(found)
        super().callSolver(lp)
