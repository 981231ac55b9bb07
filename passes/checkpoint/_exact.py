"""The exact integer program of a small step: an optimum to check the searches against.

Checkmate's program (Jain et al., MLSys 2020, eq. 1-9) with one stage a backward call. Variables:
``hold[v, k]``, value v lies there when stage k begins (k = 0: kept from forward); ``run[o, k]``,
call o is repeated in stage k, in the order of forward; ``drop[v, e]``, v goes away right after
event e of a stage (a repeat, or the backward call). Bytes are counted after every event, so that
nothing about a stage is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import pulp

from mopt.passes.checkpoint._order import Draft, draft
from mopt.passes.checkpoint._tables import Point, Tables

_EVENTS = 128
_GAP = 1e-6


@dataclass(frozen=True)
class Proved:
    """The program's plan, where it found one, and a bound on the repeated seconds of all plans."""

    draft: Draft | None
    bound: float


def small_enough(tables: Tables) -> bool:
    """Whether the program is worth a try beside the searches; inverses make its order circular."""
    if any(call.form == "inverse" for call in tables.problem.forward):
        return False
    return len(tables.free) * len(tables.problem.backward) <= _EVENTS


def solve_exactly(tables: Tables, budget: int, known: Point | None, seconds: float) -> Proved:
    """The cheapest plan within the budget, as far as it is found within ``seconds``.

    ``known`` is a plan within the budget; only cheaper ones are looked for.
    """
    model = _Model(tables, budget)
    if known is not None:
        model.lp += model.lp.objective <= known.seconds / model.time + 1e-3
    solver = pulp.HiGHS(msg=False, gapRel=_GAP, threads=1, timeLimit=seconds, random_seed=0)
    model.lp.solve(solver)
    bound = max(0.0, model.lp.solverModel.getInfo().mip_dual_bound * model.time)
    if model.lp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Proved(None, min(bound, known.seconds) if known is not None else bound)
    found = model.draft()
    # The tiny price of each repeat that breaks ties is not part of the bound.
    return Proved(
        found if found.figures.peak <= budget else None,
        max(0.0, bound - model.tie * model.time * len(model.run)),
    )


class _Model:
    """The rows; bytes and seconds are scaled to about 1."""

    def __init__(self, tables: Tables, budget: int) -> None:
        self.tables, self.problem = tables, tables.problem
        problem = self.problem
        self.stages = len(problem.backward)
        self.lp = pulp.LpProblem("recompute", pulp.LpMinimize)
        self.values = sorted(
            v for v in tables.sources if v in problem.maker and v not in problem.results
        )
        inside = frozenset(self.values)
        self.unit = max(1, max((problem.sizes[v] for v in inside), default=1))
        calls = sorted({o for v in self.values for o in problem.ways.get(v, ())})
        self.time = max(1e-12, sum(problem.forward[o].seconds for o in calls) / 10)
        self.tie = 1e-9
        last = {
            o: max((int(tables.last[v]) for v in self._again(o)[1] if v in inside), default=-1)
            for o in calls
        }
        self.inside = inside
        self.run = {
            (o, k): self.lp.add_variable(f"r_{o}_{k}", 0, 1, pulp.LpBinary)
            for o in calls for k in range(last[o] + 1)
        }  # fmt: skip
        self.calls_of = [[o for o in calls if (o, k) in self.run] for k in range(self.stages)]
        self.hold = {
            (v, k): self.lp.add_variable(
                f"h_{v}_{k}", 0, 1, pulp.LpBinary
            )
            for v in self.values for k in range(int(tables.last[v]) + 1)
        }  # fmt: skip
        self.lp += pulp.LpAffineExpression(
            [
                (x, problem.forward[o].again.seconds / self.time + self.tie)  # type: ignore[union-attr]
                for (o, _), x in self.run.items()
            ]
        )
        self._forward_rows(budget)
        for k, base in enumerate(_own_bytes(tables)):
            self._stage(k, base, budget)

    def _again(self, o: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        again = self.problem.forward[o].again
        assert again is not None
        return again.reads, again.makes

    def _forward_rows(self, budget: int) -> None:
        """What is kept lies beside what the rest of the forward pass needs."""
        plain, ends = self.tables.arrays.plain, self.tables.arrays.ends
        for index, live in enumerate(plain):
            kept = [
                (self.hold[v, 0], self.problem.sizes[v] / self.unit)
                for v in self.values if ends[v] < index and (v, 0) in self.hold
            ]  # fmt: skip
            if kept:
                self.lp += pulp.LpAffineExpression(kept) <= (budget - int(live)) / self.unit

    def _stage(self, k: int, base: int, budget: int) -> None:
        """What lies there through the events of a stage, and what each event needs."""
        problem, sizes = self.problem, self.problem.sizes
        calls = self.calls_of[k]
        call = problem.backward[k]
        events = [(o, *self._again(o), self.run[o, k]) for o in calls]
        made: dict[int, int] = {}
        for place, (_, _, makes, _) in enumerate(events):
            made.update(dict.fromkeys(makes, place))
        there = [v for v in self.values if (v, k) in self.hold or v in made]
        # Which events read or make a value, in order; the backward call is the last.
        touching: dict[int, list[int]] = {v: [] for v in there}
        for place, (_, reads, makes, _) in enumerate(events):
            for v in {*reads, *makes}:
                if v in touching:
                    touching[v].append(place)
        for v in call.reads:
            if v in touching:
                touching[v].append(len(events))
        for _, reads, _, x in events:
            for u in reads:
                if u in self.inside:
                    self.lp += pulp.LpAffineExpression([*self._there(u, k), (x, -1.0)]) >= 0
        for v in call.reads:
            if v in self.inside:
                self.lp += pulp.LpAffineExpression(self._there(v, k)) >= 1
        drops: list[list[tuple[pulp.LpVariable, float]]] = [[] for _ in range(len(events) + 1)]
        for v in there:
            stay = self.hold.get((v, k + 1))
            if stay is not None:
                self.lp += pulp.LpAffineExpression([*self._there(v, k), (stay, -1.0)]) >= 0
            for place in touching[v]:
                drop = self.lp.add_variable(f"d_{v}_{k}_{place}", 0, 1)
                drops[place].append((drop, sizes[v] / self.unit))
                if place < len(events):
                    self.lp += drop <= events[place][3]
                if stay is not None:
                    self.lp += pulp.LpAffineExpression([(drop, 1.0), (stay, 1.0)]) <= 1
                for other in touching[v]:
                    # A later event that touches the value, the backward call included.
                    if other > place and other < len(events):
                        self.lp += drop + events[other][3] <= 1
                    elif other > place:
                        self.lp += drop <= 0
        total = [(self.hold[v, k], sizes[v] / self.unit) for v in there if (v, k) in self.hold]
        for place, (o, _, makes, x) in enumerate(events):
            fresh = []
            for v in makes:
                if v in touching:
                    fresh.append((self._new(v, k, place, x), sizes[v] / self.unit))
            again = problem.forward[o].again
            assert again is not None
            space = again.workspace + sum(sizes[v] for v in makes if v not in touching)
            total = self._total(f"u_{k}_{place}", [*total, *fresh])
            held = base - call.workspace - self._made_by(k)
            self.lp += (
                pulp.LpAffineExpression([*total, (x, space / self.unit)])
                <= (budget - held) / self.unit
            )
            total = [*total, *((d, -size) for d, size in drops[place])]
        self.lp += pulp.LpAffineExpression(total) <= (budget - base) / self.unit

    def _made_by(self, k: int) -> int:
        """Bytes that only the backward call of a stage makes."""
        return sum(
            self.problem.sizes[s] for s in self.problem.backward[k].makes
            if s not in self.problem.maker and s not in self.problem.given
        )  # fmt: skip

    def _new(self, v: int, k: int, place: int, x: pulp.LpVariable) -> pulp.LpVariable:
        """Whether a repeat brings bytes that are not there: not where the value is held."""
        held = self.hold.get((v, k))
        if held is None:
            return x
        fresh = self.lp.add_variable(f"n_{v}_{k}_{place}", 0, 1)
        self.lp += pulp.LpAffineExpression([(fresh, 1.0), (held, 1.0), (x, -1.0)]) >= 0
        return fresh

    def _total(
        self, name: str, terms: list[tuple[pulp.LpVariable, float]]
    ) -> list[tuple[pulp.LpVariable, float]]:
        total = self.lp.add_variable(name, 0)
        self.lp += pulp.LpAffineExpression([*terms, (total, -1.0)]) == 0
        return [(total, 1.0)]

    def _there(self, v: int, k: int) -> list[tuple[pulp.LpVariable, float]]:
        """Variables one of which must be set for v to be readable in stage k."""
        found = []
        if (v, k) in self.hold:
            found.append((self.hold[v, k], 1.0))
        runs = (self.run.get((o, k)) for o in self.problem.ways.get(v, ()))
        return found + [(x, 1.0) for x in runs if x is not None]

    def draft(self) -> Draft:
        """The program's plan with its replay."""
        held = {(v, k - 1) for (v, k), x in self.hold.items() if self._set(x)}
        return draft(self.problem, {v for v, k in held if k < 0}, held, self._way)

    def _way(self, k: int, v: int) -> int | None:
        ways = self.problem.ways.get(v, ())
        chosen = (o for o in ways if (o, k) in self.run and self._set(self.run[o, k]))
        return next(chosen, self.problem.remakes.get(v))

    @staticmethod
    def _set(variable: pulp.LpVariable) -> bool:
        return bool((variable.varValue or 0) > 0.5)


def _own_bytes(tables: Tables) -> list[int]:
    """Bytes of each backward call that no choice changes: gradients, results, its workspace."""
    problem, sizes = tables.problem, tables.problem.sizes
    held = problem.constant + sum(sizes[s] for s in problem.results if s in problem.maker)
    ends: dict[int, int] = {}
    for index, call in enumerate(problem.backward):
        for s in (*call.reads, *call.makes):
            ends[s] = index
    found = []
    for index, call in enumerate(problem.backward):
        own = [s for s in call.makes if s not in problem.maker and s not in problem.given]
        held += sum(sizes[s] for s in own)
        found.append(held + call.workspace)
        for s in {*call.reads, *call.makes}:
            dies = ends[s] == index and s not in problem.results
            if dies and s not in problem.maker and s not in problem.given:
                held -= sizes[s]
    return found
