"""The integer program: what is kept, and which repeated values are held from stage to stage.

Variables: ``s_v``, value v is kept from forward until its last possible use; ``a_vk``, a repeated v
is held across the end of stage k; ``r_ok``, call o is repeated in stage k. It is Checkmate's
program (Jain et al., MLSys 2020, eq. 1-9) with stages that hold several backward calls and a window
of stages per call. Within a stage only what backward reads or what is held counts, not what dies on
the way there: ``draft`` and ``replay`` give the exact figures, and the budget of the rows is moved
until they agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import pulp

from mopt.passes.checkpoint._order import Draft, Stages, closed, draft, must_keep, sources
from mopt.recompute import RecomputeProblem

GAP = 0.005


@dataclass(frozen=True)
class _Facts:
    """What the program says about a problem, apart from the budget."""

    values: tuple[int, ...]
    fixed: frozenset[int]
    first: dict[int, int]
    last: dict[int, int]
    calls: tuple[int, ...]
    window: dict[int, range]
    needs: tuple[frozenset[int], ...]
    base: tuple[int, ...]


def facts(problem: RecomputeProblem, stages: Stages, width: int) -> _Facts:
    """Windows and constants; a call may be repeated from ``width`` stages before its last use."""
    values = tuple(sorted(sources(problem)))
    inside = frozenset(values)
    count = len(stages.ends)
    needs: list[set[int]] = [set() for _ in range(count)]
    last: dict[int, int] = {}
    first: dict[int, int] = {}
    for index, call in enumerate(problem.backward):
        k = stages.stage_of[index]
        for s in call.reads:
            if s in inside:
                needs[k].add(s)
                last[s] = k
                first.setdefault(s, k)
    order = sorted({problem.remakes[s] for s in values if s in problem.remakes}, reverse=True)
    window: dict[int, range] = {}
    for index in order:
        again = problem.forward[index].again
        assert again is not None
        ends = [last[s] for s in again.makes if s in last]
        begins = [first[s] for s in again.makes if s in first]
        if not ends:
            continue
        window[index] = range(max(0, min(max(begins), max(ends)) - width), max(ends) + 1)
        for u in again.reads:
            if u in inside:
                last[u] = max(last.get(u, 0), max(ends))
                first[u] = min(first.get(u, count), min(begins))
    fixed = must_keep(problem) | (problem.results & inside)
    kept = tuple(v for v in values if v in last)
    return _Facts(
        kept, frozenset(fixed), first, last, tuple(sorted(window)), window,
        tuple(frozenset(n) for n in needs), _own_bytes(problem, stages),
    )  # fmt: skip


def _own_bytes(problem: RecomputeProblem, stages: Stages) -> tuple[int, ...]:
    """Most bytes of each stage that no choice changes: gradients, workspaces, results."""
    sizes = problem.sizes
    held = problem.constant + sum(sizes[s] for s in problem.results if s in problem.maker)
    ends: dict[int, int] = {}
    for index, call in enumerate(problem.backward):
        for s in (*call.reads, *call.makes):
            ends[s] = index
    most = [0] * len(stages.ends)
    for index, call in enumerate(problem.backward):
        own = [s for s in call.makes if s not in problem.maker and s not in problem.given]
        held += sum(sizes[s] for s in own)
        k = stages.stage_of[index]
        most[k] = max(most[k], held + call.workspace)
        for s in {*call.reads, *call.makes}:
            dies = ends[s] == index and s not in problem.results
            if dies and s not in problem.maker and s not in problem.given:
                held -= sizes[s]
    return tuple(most)


def solve(
    problem: RecomputeProblem,
    stages: Stages,
    about: _Facts,
    budget: int,
    *,
    seconds: float,
    below: float | None = None,
) -> tuple[Draft, float] | None:
    """The cheapest plan found within the rows' budget, and the program's own bound.

    ``below`` are the repeated seconds of a known plan, above which none is of interest.
    """
    model = _Model(problem, stages, about, budget)
    if below is not None:
        model.lp += model.lp.objective <= below / model.time + 0.01
    state, bound = model.run(seconds)
    if state not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    saved = frozenset(v for v, x in model.keep.items() if (x.varValue or 0) > 0.5) | about.fixed
    held = {key for key, x in model.hold.items() if (x.varValue or 0) > 0.5}
    return draft(problem, closed(problem, saved), stages, held), bound


class _Model:
    """The rows; bytes and seconds are scaled to about 1."""

    def __init__(
        self, problem: RecomputeProblem, stages: Stages, about: _Facts, budget: int
    ) -> None:
        self.problem, self.about = problem, about
        self.lp = pulp.LpProblem("recompute", pulp.LpMinimize)
        self.unit = max(1.0, sum(problem.sizes[v] for v in about.values) / 100)
        self.time = max(1e-12, problem.seconds / 1000)
        self.keep = {
            v: self.lp.add_variable(f"s_{v}", 1 if v in about.fixed else 0, 1, pulp.LpBinary)
            for v in about.values
        }
        self.run_again: dict[tuple[int, int], pulp.LpVariable] = {
            (o, k): self.lp.add_variable(f"r_{o}_{k}", 0, 1, pulp.LpBinary)
            for o in about.calls for k in about.window[o]
        }  # fmt: skip
        self.hold: dict[tuple[int, int], pulp.LpVariable] = {}
        for o in about.calls:
            again = problem.forward[o].again
            assert again is not None
            for v in again.makes:
                if v in self.keep and v not in about.fixed:
                    for k in about.window[o][:-1]:
                        if k < about.last[v]:
                            self.hold[v, k] = self.lp.add_variable(
                                f"a_{v}_{k}", 0, 1, pulp.LpBinary
                            )
        self._objective()
        self._rules(len(stages.ends))
        self._memory(budget, len(stages.ends))

    def _objective(self) -> None:
        calls = self.problem.forward
        terms = []
        for (o, _), x in self.run_again.items():
            again = calls[o].again
            assert again is not None
            terms.append((x, again.seconds / self.time + 1e-6))
        self.lp += pulp.LpAffineExpression(terms)

    def _there(self, v: int, k: int) -> list[tuple[pulp.LpVariable, float]]:
        """Variables one of which must be set for v to be readable in stage k."""
        found = [(self.keep[v], 1.0)]
        if (v, k - 1) in self.hold:
            found.append((self.hold[v, k - 1], 1.0))
        o = self.problem.remakes.get(v)
        if o is not None and (o, k) in self.run_again:
            found.append((self.run_again[o, k], 1.0))
        return found

    def _rules(self, count: int) -> None:
        for k in range(count):
            for v in sorted(self.about.needs[k]):
                self.lp += pulp.LpAffineExpression(self._there(v, k)) >= 1
        for (o, k), x in self.run_again.items():
            again = self.problem.forward[o].again
            assert again is not None
            for u in again.reads:
                if u in self.keep:
                    self.lp += pulp.LpAffineExpression([*self._there(u, k), (x, -1.0)]) >= 0
        for (v, k), x in self.hold.items():
            terms = [t for t in self._there(v, k) if t[0] is not self.keep[v]]
            self.lp += pulp.LpAffineExpression([*terms, (x, -1.0)]) >= 0

    def _memory(self, budget: int, count: int) -> None:
        sizes, about, calls = self.problem.sizes, self.about, self.problem.forward
        ending: list[list[int]] = [[] for _ in range(count)]
        for v in about.values:
            # Results are in the constants already.
            if v not in self.problem.results:
                ending[about.last[v]].append(v)
        here: list[list[tuple[pulp.LpVariable, float]]] = [[] for _ in range(count)]
        for (o, k), x in self.run_again.items():
            again = calls[o].again
            assert again is not None
            size = sum(sizes[v] for v in again.makes if v in about.needs[k] - about.fixed)
            here[k].append((x, size / self.unit))
        for (v, k), x in self.hold.items():
            here[k + 1].append((x, sizes[v] / self.unit))
        after: pulp.LpVariable | None = None
        for k in range(count - 1, -1, -1):
            kept = self.lp.add_variable(f"u_{k}", 0)
            terms = [(self.keep[v], sizes[v] / self.unit) for v in ending[k]]
            if after is not None:
                terms.append((after, 1.0))
            self.lp += pulp.LpAffineExpression([*terms, (kept, -1.0)]) == 0
            after = kept
            room = (budget - about.base[k]) / self.unit
            self.lp += pulp.LpAffineExpression([(kept, 1.0), *here[k]]) <= room
        self._forward_rows(budget)

    def _forward_rows(self, budget: int) -> None:
        """What is kept lies beside what the rest of the forward pass needs."""
        problem, sizes = self.problem, self.problem.sizes
        ends = {s: i for i, call in enumerate(problem.forward) for s in (*call.reads, *call.makes)}
        held = problem.constant
        done: pulp.LpVariable | None = None
        passed: list[tuple[pulp.LpVariable, float]] = []
        for index, call in enumerate(problem.forward):
            held += sum(sizes[s] for s in call.makes)
            room = (budget - held - call.workspace) / self.unit
            row = [*passed] if done is None else [*passed, (done, 1.0)]
            if passed:
                total = self.lp.add_variable(f"f_{index}", 0)
                self.lp += pulp.LpAffineExpression([*row, (total, -1.0)]) == 0
                done, passed = total, []
            if done is not None:
                self.lp += pulp.LpAffineExpression([(done, 1.0)]) <= room
            for s in {*call.reads, *call.makes}:
                if s in problem.maker and ends[s] == index and s not in problem.results:
                    held -= sizes[s]
                    if s in self.keep:
                        passed.append((self.keep[s], sizes[s] / self.unit))

    def run(self, seconds: float) -> tuple[int, float]:
        """PuLP's solution state and the proved lower bound on the repeated seconds, in the rows."""
        solver = pulp.HiGHS(
            msg=False, gapRel=GAP, threads=1, timeLimit=seconds, random_seed=0
        )  # fmt: skip
        self.lp.solve(solver)
        bound = self.lp.solverModel.getInfo().mip_dual_bound * self.time
        return self.lp.sol_status, bound
