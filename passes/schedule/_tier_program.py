"""The integer program of a tier plan: how much of each value stays so that every step fits.

A value consists of equal pieces, of which the first ``k`` stay in the fast memory during a gap and
the first ``r`` lie there at a touch; the others are streamed. With shares instead of counts:

    minimise   sum of bytes (1 - k)  over gaps  +  sum of bytes z  over spells
    k <= r     for the touches at both ends of a gap: what is kept is used where it lies
    z >= 1 - k for every gap of a spell, z >= 1 - r where it has none
    w <= r     and w is 0 or 1: the value is there as a whole and needs no window
    sum of (window (1 - w) + bytes r) at touches + sum of bytes k inside gaps <= fast memory
    w = 1      for one of the factors of a product

Gaps and touches that no tight step sees are kept and resident. A result that takes over an
operand's memory counts only where it is larger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil

import pulp

from mopt.errors import InputError
from mopt.passes.schedule._tier_gaps import Gap, Gaps, takable

# What HiGHS tolerates by itself (1e-6) is more than an aligned value of a large memory.
_FEASIBLE = 1e-9
_WHOLE = 1e-6
_LEAST_SECONDS = 0.05

# What may lie in the fast memory: ("gap", value, gap), ("touch", value, touch), a result that takes
# over no operand's memory ("over", value, step), and ("whole", value, touch), which saves a window.
# A row is a step, its room, and terms.
_Key = tuple[str, int, int]
_Term = tuple[int, _Key]
_Row = tuple[int, int, list[_Term]]


@dataclass(frozen=True)
class Kept:
    """An answer: pieces that stay during gaps and lie there at touches, its cost, its bound.

    What is not listed stays whole.
    """

    gaps: Mapping[Gap, int] = field(default_factory=dict)
    touches: Mapping[Gap, int] = field(default_factory=dict)
    cost: int = 0
    bound: int = 0


class TierProgram:
    """The program for the gaps of one order, or for those of every order."""

    def __init__(self, gaps: Gaps, room: int | None = None, *, relaxed: bool = False) -> None:
        self.gaps, self.problem = gaps, gaps.problem
        self._kind = pulp.LpContinuous if relaxed else pulp.LpInteger
        self.lp = pulp.LpProblem("tiers", pulp.LpMinimize)
        self.keep: dict[Gap, pulp.LpVariable] = {}
        self.resident: dict[Gap, pulp.LpVariable] = {}
        self.wholes: dict[Gap, pulp.LpVariable] = {}
        self._place = [{t: i for i, t in enumerate(touches)} for touches in gaps.touches]
        room = self.problem.fast_bytes if room is None else room
        self._unit = float(max(1, self.problem.fast_bytes))
        rows: list[_Row] = []
        for t in range(len(self.problem.steps)):
            fixed, terms = self._row(t)
            if fixed + sum(weight for weight, _ in terms if weight > 0) > room:
                rows.append((t, room - fixed, terms))
        self.rows = _undominated(rows)
        for t, left, terms in self.rows:
            row = (x * share for weight, key in terms for x, share in self._scaled(t, key, weight))
            self.lp += pulp.lpSum(row) <= left / self._unit
        for t, step in enumerate(self.problem.steps):
            for group in step.one_of:
                self._one_of(t, group)
        self._objective()

    def _row(self, t: int) -> tuple[int, list[_Term]]:
        """Fixed bytes of a step, and (bytes, what) of everything that may lie there."""
        step, problem = self.problem.steps[t], self.problem
        fixed = step.workspace + sum(problem.window(name) for name in step.touches)
        inside = dict(self.gaps.inside[t])
        terms: list[_Term] = []
        operands = takable(self.gaps, t)
        for name in step.touches:
            v = problem.number[name]
            size, window = problem.value[name].bytes, problem.window(name)
            place = self._place[v].get(t)
            if place is not None:
                lies = ("over", v, t) if operands and name == step.makes[0] else ("touch", v, place)
                terms += [(size, lies), (-window, ("whole", v, place))]
            elif v in inside:
                # Where the touch itself has no place in the order, its window may be saved.
                fixed -= window
                terms.append((size, ("gap", v, inside[v])))
            else:
                fixed -= window
        touched = {problem.number[name] for name in step.touches}
        terms += [
            (problem.values[v].bytes, ("gap", v, g)) for v, g in self.gaps.inside[t]
            if v not in touched
        ]  # fmt: skip
        return fixed, [(weight, key) for weight, key in terms if weight]

    def _scaled(self, t: int, key: _Key, weight: int) -> Iterable[tuple[pulp.LpVariable, float]]:
        kind, v, n = key
        share = weight / self._unit / self.problem.pieces(v)
        if kind == "gap":
            yield self._gap(v, n), share
        elif kind == "touch":
            yield self._touch(v, n), share
        elif kind == "whole":
            yield self._whole(v, n), weight / self._unit
        else:
            yield self._over(v, t), share

    def _over(self, v: int, t: int) -> pulp.LpVariable:
        """Pieces of a result that lie beside the operands instead of in the memory of one."""
        most = self.problem.pieces(v)
        over = self.lp.add_variable(f"over_{t}", 0, most)
        places = self._operands(t)
        if None in places:
            return over
        there = [self._touch(*place) for place in places if place is not None]
        if len(there) > 1 and self.gaps.is_ordered:
            there = [self._chosen(t, n, r, most) for n, r in enumerate(there)]
            self.lp += pulp.lpSum(choice for choice, _ in there) <= 1
            there = [used for _, used in there]
        self.lp += over + pulp.lpSum(there) >= self._touch(v, self._place[v][t])
        return over

    def _chosen(
        self, t: int, n: int, resident: pulp.LpVariable, most: int
    ) -> tuple[pulp.LpVariable, pulp.LpVariable]:
        choice = self.lp.add_variable(f"take_{t}_{n}", 0, 1, cat=self._kind)
        used = self.lp.add_variable(f"used_{t}_{n}", 0, most)
        self.lp += used <= resident
        self.lp += used <= most * choice
        return choice, used

    def _operands(self, t: int) -> list[Gap | None]:
        """The touches of the operands whose memory the result may take over."""
        found: list[Gap | None] = []
        for name in takable(self.gaps, t):
            v = self.problem.number[name]
            place = self._place[v].get(t)
            found.append(None if place is None else (v, place))
        return found

    def _new(self, name: str, v: int) -> pulp.LpVariable:
        most = self.problem.pieces(v)
        # A slow memory that takes nothing cannot give back what was made.
        least = 0 if self.problem.writable or self.problem.values[v].given else most
        return self.lp.add_variable(name, least, most, cat=self._kind)

    def _gap(self, v: int, g: int) -> pulp.LpVariable:
        if (v, g) not in self.keep:
            self.keep[v, g] = self._new(f"k_{v}_{g}", v)
            self.lp += self.keep[v, g] <= self._touch(v, g)
            self.lp += self.keep[v, g] <= self._touch(v, g + 1)
        return self.keep[v, g]

    def _touch(self, v: int, i: int) -> pulp.LpVariable:
        if (v, i) not in self.resident:
            self.resident[v, i] = self._new(f"r_{v}_{i}", v)
            for g in (i - 1, i):
                if 0 <= g < len(self.gaps.touches[v]) - 1:
                    self._gap(v, g)
        return self.resident[v, i]

    def _whole(self, v: int, i: int) -> pulp.LpVariable:
        """Whether a value is there as a whole at a touch."""
        if self.problem.pieces(v) == 1:
            return self._touch(v, i)
        if (v, i) not in self.wholes:
            self.wholes[v, i] = self.lp.add_variable(f"w_{v}_{i}", 0, 1, cat=self._kind)
            self.lp += self._touch(v, i) >= self.problem.pieces(v) * self.wholes[v, i]
        return self.wholes[v, i]

    def _one_of(self, t: int, group: Iterable[str]) -> None:
        """One factor is resident as a whole; touches without a variable are anyway."""
        places = []
        for name in group:
            v = self.problem.number[name]
            i = self._place[v].get(t, -1)
            if (v, i) not in self.resident:
                return
            places.append((v, i))
        self.lp += pulp.lpSum(self._whole(v, i) for v, i in places) >= 1

    def _objective(self) -> None:
        terms, self._most = [], 0
        for (v, _), k in self.keep.items():
            size = self.problem.values[v].bytes
            terms.append((k, -size / self._unit / self.problem.pieces(v)))
            self._most += size
        for n, spell in enumerate(self.gaps.spells):
            v = spell.value
            stay = [self.keep[v, g] for g in range(spell.first, spell.last) if (v, g) in self.keep]
            if spell.first == spell.last and (v, spell.first) in self.resident:
                stay = [self.resident[v, spell.first]]
            if stay:
                pieces = self.problem.pieces(v)
                z = self.lp.add_variable(f"z_{n}", 0, pieces)
                terms.append((z, self.problem.values[v].bytes / self._unit / pieces))
                for k in stay:
                    self.lp += z + k >= pieces
        self.lp += pulp.LpAffineExpression(terms)

    def fix(self, kept: Mapping[Gap, int]) -> None:
        """Decide gaps before solving."""
        for gap, pieces in kept.items():
            self.keep[gap].lowBound = self.keep[gap].upBound = pieces

    def solve(self, seconds: float) -> Kept | None:
        """The best answer found in time, None where there is none."""
        if not self.rows:
            return Kept()
        self.lp.solve(pulp.HiGHS(
            msg=False, threads=1, random_seed=0, gapRel=0.0, timeLimit=max(seconds, _LEAST_SECONDS),
            primal_feasibility_tolerance=_FEASIBLE, mip_feasibility_tolerance=_FEASIBLE,
        ))  # fmt: skip
        if self.lp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None
        gaps = {gap: round(k.value() or 0.0) for gap, k in self.keep.items()}
        touches = {at: round(r.value() or 0.0) for at, r in self.resident.items()}
        cost = cost_of(self.gaps, gaps, touches)
        found = self.lp.solverModel.getInfo().mip_dual_bound * self._unit + self._most
        bound = cost if self.lp.sol_status == pulp.LpSolutionOptimal else _up(found)
        return Kept(gaps, touches, cost, max(0, min(bound, cost)))

    def nothing(self) -> Kept:
        """The answer that keeps nothing: one factor of a product lies there, all else is streamed.

        Raises InputError (``fast-memory-too-small``) where the slow memory takes nothing.
        """
        if not self.problem.writable:
            raise InputError(
                f"what is made does not fit into {self.problem.fast_bytes} bytes, and the slow "
                "memory cannot be written to",
                code="fast-memory-too-small",
            )
        gaps = {
            (v, g): 0 for v, touches in enumerate(self.gaps.touches)
            for g in range(len(touches) - 1)
        }  # fmt: skip
        touches = {
            (v, i): 0 for v, steps in enumerate(self.gaps.touches) for i in range(len(steps))
        }
        for t, step in enumerate(self.problem.steps):
            for group in step.one_of:
                v = min((self.problem.number[name] for name in group),
                        key=lambda v: self.problem.values[v].bytes)  # fmt: skip
                touches[v, self._place[v][t]] = self.problem.pieces(v)
        cost = cost_of(self.gaps, gaps, touches)
        return Kept(gaps, touches, cost, 0)

    def relax(self, seconds: float) -> tuple[int, dict[Gap, float]] | None:
        """The bound of the linear program, and how many pieces it keeps during every gap."""
        if not self.rows:
            return 0, {}
        self.lp.solve(pulp.HiGHS(
            mip=False, msg=False, threads=1, random_seed=0, timeLimit=max(seconds, _LEAST_SECONDS)
        ))  # fmt: skip
        if self.lp.sol_status != pulp.LpSolutionOptimal:
            return None
        value = (pulp.value(self.lp.objective) or 0.0) * self._unit + self._most
        return max(0, _up(value)), {gap: float(k.value() or 0.0) for gap, k in self.keep.items()}


def cost_of(gaps: Gaps, kept: Mapping[Gap, int], resident: Mapping[Gap, int]) -> int:
    """Bytes moved beyond the compulsory ones: reads at the end of gaps, and writes of spells."""
    problem = gaps.problem
    total = sum(problem.bytes_beyond(v, pieces) for (v, _), pieces in kept.items())
    for spell in gaps.spells:
        v, whole = spell.value, problem.pieces(spell.value)
        stay = [kept.get((v, g), whole) for g in range(spell.first, spell.last)]
        if not stay:
            stay = [resident.get((v, spell.first), whole)]
        total += problem.bytes_beyond(v, min(stay))
    return total


def _up(value: float) -> int:
    """The next whole number, forgiving the rounding of the solver."""
    return ceil(value - _WHOLE * max(1.0, abs(value)))


def _undominated(rows: list[_Row]) -> list[_Row]:
    """Rows that no neighbour implies: as much room, and all of its terms at least as large."""
    kept: list[_Row] = []
    sets = [{key: weight for weight, key in terms} for _, _, terms in rows]
    for n, (t, left, terms) in enumerate(rows):
        implied = False
        for other in (n - 1, n + 1):
            if 0 <= other < len(rows) and (len(rows[other][2]), -other) > (len(terms), -n):
                there = sets[other]
                implied |= (
                    rows[other][1] <= left
                    and min(there.values(), default=0) >= 0
                    and all(there.get(key, 0) >= weight for weight, key in terms)
                )
        if not implied:
            kept.append((t, left, terms))
    return kept
