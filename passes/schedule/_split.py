"""Which results lie in the arena and which the runtime allocates for itself.

What a run needs is the arena, which is there all the time, plus the most that is allocated beside
it at one moment: workspaces of calls, results handed to the caller, and results kept out of the
arena. With everything beside the arena that is the peak of the order, and no division needs less;
where the fewest results beside it need more, as many as possible come back into the arena.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pulp
from numpy.typing import NDArray

from mopt.passes.schedule._order_problem import OrderProblem, Run

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
# Of the integer program: chains of less than this part of all bytes are left out of it, how near to
# the largest arena is enough, and when it gives up.
_SMALL, _NEAR, _NODES, _SECONDS = 500, 0.02, 2000, 10.0


@dataclass(frozen=True)
class Lifetimes:
    """Positions in an order, first and after the last, for every storage that some call makes."""

    lower: dict[int, int]
    upper: dict[int, int]
    taken: dict[int, int]


def lifetimes(problem: OrderProblem, order: Sequence[int], outside: Iterable[int]) -> Lifetimes:
    """When storages live if calls run in this order.

    ``taken`` says for a storage whose memory it takes over: both lie in the arena, or both are
    ``outside``.
    """
    lower, upper, taken = {}, {}, {}
    away = set(outside)
    run = Run(problem)
    for position, v in enumerate(order):
        for s in problem.touches[v]:
            upper[s] = position + 1
        for s in problem.makes[v]:
            lower[s] = position
        source = run.taken_storage(v)
        if source is not None and (source in away) == (problem.makes[v][0] in away):
            taken[problem.makes[v][0]] = source
        run.run(v)
    for s in problem.kept:
        upper[s] = len(order)
    return Lifetimes(lower, upper, taken)


@dataclass(frozen=True)
class Beside:
    """What is allocated beside the arena: the storages, and at most how many bytes at once."""

    storages: frozenset[int]
    peak: int


def split(
    problem: OrderProblem,
    order: Sequence[int],
    *,
    never_placed: frozenset[int],
    placed_workspace: Sequence[int | None],
    plain_workspace: Sequence[int],
) -> Beside:
    """The division with the least arena load plus peak beside it, and few results beside it.

    ``never_placed`` cannot lie in the arena: results of the program and of calls that allocate by
    themselves. Workspaces are given by operator: for a result in given memory (None where it
    cannot be), and for one that the operator allocates.
    """
    division = _Division(problem, order, placed_workspace, plain_workspace)
    least = np.array([s in never_placed for s in division.storages], bool)
    everything = np.ones(len(least), bool)
    goal = division.total(everything)
    if not len(least) or division.total(least) <= goal:
        return division.beside(least)
    away = _largest_arena(division, least, goal, everything)
    for group in division.chains(least):
        trial = away.copy()
        trial[group] = False
        if away[group].any() and division.total(trial) <= goal:
            away = trial
    return division.beside(away)


def _largest_arena(division: _Division, fixed: Bools, goal: int, everything: Bools) -> Bools:
    """What lies beside the arena where most of the rest lies in it and ``goal`` bytes are enough.

    An integer program over chains of storages; small ones stay beside. Rows are in shares of
    ``goal``. Gives ``everything`` where the solver finds nothing better.
    """
    chains = [group for group in division.chains(fixed, alone=False)
              if division.size[group].max() * _SMALL > goal]  # fmt: skip
    lp = pulp.LpProblem("arena", pulp.LpMaximize)
    arena = lp.add_variable("arena", 0, 1)
    inside = [lp.add_variable(f"in{k}", cat=pulp.LpBinary) for k in range(len(chains))]
    lp += pulp.lpSum(
        x * float(division.bytes_by_time(group)) / goal / division.length
        for x, group in zip(inside, chains, strict=True)
    )
    there, gone = [], []
    beside = division.load(everything, inside=False)
    for group in chains:
        trial = everything.copy()
        trial[group] = False
        there.append(division.load(trial, inside=True))
        gone.append(division.load(trial, inside=False) - beside)
    for columns, least in ((there, 0), (gone, beside)):
        rows = np.unique(np.array([*columns, least + np.zeros_like(beside)]).T, axis=0)
        for *parts, base in rows.tolist():
            load = pulp.lpSum(
                x * (part / goal) for x, part in zip(inside, parts, strict=True) if part
            )
            if columns is there:
                lp += load <= arena
            else:
                lp += load + arena <= 1 - base / goal
    lp.solve(pulp.HiGHS(
        msg=False, threads=1, random_seed=0, gapRel=_NEAR, timeLimit=_SECONDS, mip_max_nodes=_NODES,
        primal_feasibility_tolerance=1e-9, mip_feasibility_tolerance=1e-9,
    ))  # fmt: skip
    found = everything.copy()
    if lp.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        for x, group in zip(inside, chains, strict=True):
            found[group] = (x.value() or 0.0) < 0.5
    return found if division.total(found) <= goal else everything


class _Division:
    """Bytes in the arena and beside it at every position, for any set of storages beside it."""

    def __init__(
        self,
        problem: OrderProblem,
        order: Sequence[int],
        placed_workspace: Sequence[int | None],
        plain_workspace: Sequence[int],
    ) -> None:
        times = lifetimes(problem, order, ())
        self.length = len(order)
        self.storages = sorted(times.lower)
        index = {s: k for k, s in enumerate(self.storages)}
        self.size = _ints(problem.sizes[s] for s in self.storages)
        self.lower = _ints(times.lower[s] for s in self.storages)
        self.upper = _ints(times.upper[s] for s in self.storages)
        # Where a storage takes over another's memory, that one; else itself.
        self.source = _ints(index[times.taken.get(s, s)] for s in self.storages)
        placed = [plain_workspace[v] if placed_workspace[v] is None else placed_workspace[v]
                  for v in order]  # fmt: skip
        self.placed = _ints(int(b or 0) for b in placed)
        self.plain = _ints(plain_workspace[v] for v in order)

    def total(self, away: Bools) -> int:
        """Bytes of the arena and beside it."""
        return sum(int(self.load(away, inside=side).max(initial=0)) for side in (True, False))

    def beside(self, away: Bools) -> Beside:
        """The division as it is used."""
        chosen = frozenset(s for s, out in zip(self.storages, away, strict=True) if out)
        return Beside(chosen, int(self.load(away, inside=False).max(initial=0)))

    def chains(self, fixed: Bools, *, alone: bool = True) -> list[Ints]:
        """Storages that take over each other's memory, none of them ``fixed``: those that take
        most bytes for most steps first, and then, if asked for, their members ``alone``."""
        root = np.where(fixed[self.source], np.arange(len(fixed)), self.source)
        while (root != root[root]).any():
            root = root[root]
        groups: dict[int, list[int]] = {}
        for k in range(len(root)):
            if not fixed[k]:
                groups.setdefault(int(root[k]), []).append(k)
        ranked = sorted(groups.values(), key=lambda g: (-self.bytes_by_time(_ints(g)), g[0]))
        members = [[k] for group in ranked if len(group) > 1 for k in group] if alone else []
        return [_ints(group) for group in (*ranked, *members) if self.size[group].any()]

    def bytes_by_time(self, group: Ints) -> int:
        """Bytes times steps that some storages need."""
        return int((self.size[group] * (self.upper - self.lower)[group]).sum())

    def load(self, away: Bools, *, inside: bool) -> Ints:
        """Bytes alive at every position in the arena, or beside it with the workspaces."""
        side = ~away if inside else away
        takes = (away[self.source] == away) & (self.source != np.arange(len(away)))
        # Memory that is taken over counts as the source's while both are alive.
        first = self.lower + takes
        change = np.zeros(self.length + 2, np.int64)
        np.add.at(change, first[side], self.size[side])
        np.add.at(change, self.upper[side], -self.size[side])
        load = np.cumsum(change)[: self.length]
        if not inside:
            load += self._workspace(away, takes)
        return load

    def _workspace(self, away: Bools, takes: Bools) -> Ints:
        """Of every call: a result beside the arena is made in whichever way needs less."""
        free = np.zeros(self.length, bool)
        free[self.lower[away & ~takes]] = True
        return np.where(free, np.minimum(self.placed, self.plain), self.placed)


def _ints(values: Iterable[int]) -> Ints:
    return np.array(list(values), np.int64)
