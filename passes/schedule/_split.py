"""Which results lie in the arena and which the runtime allocates for itself.

What a run needs is the arena, which is there all the time, plus the most that is allocated beside
it at one moment: workspaces of calls, results handed to the caller, and results kept out of the
arena. Results move out where there is room beside the arena anyway, because a larger call needs
it at another time; how much room is worth having is tried out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mopt.passes.schedule._order_problem import OrderProblem, Run

Ints = NDArray[np.int64]
_LEVELS = 32


@dataclass(frozen=True)
class Lifetimes:
    """Positions in an order, first and after the last, for every storage that some call makes."""

    lower: dict[int, int]
    upper: dict[int, int]
    taken: dict[int, int]


def lifetimes(problem: OrderProblem, order: Sequence[int], outside: Iterable[int]) -> Lifetimes:
    """When storages live if calls run in this order; those ``outside`` are no place to reuse.

    ``taken`` says for a storage whose memory it takes over.
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
        if source is not None and source not in away and problem.makes[v][0] not in away:
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
    placed_workspace: Sequence[int],
    plain_workspace: Sequence[int],
) -> Beside:
    """The division with the least arena load plus peak beside it.

    ``never_placed`` cannot lie in the arena: results of the program and of calls that allocate by
    themselves. Workspaces are given by operator for a placed result and for an allocated one.
    """
    best: tuple[int, int, Beside] | None = None
    least = _Division(problem, order, never_placed, placed_workspace, plain_workspace)
    everything = _Division(
        problem, order, frozenset(lifetimes(problem, order, ()).lower), placed_workspace,
        plain_workspace,
    )  # fmt: skip
    low, high = int(least.beside.max(initial=0)), int(everything.beside.max(initial=0))
    levels = sorted({low, high, *np.linspace(min(low, high), max(low, high), _LEVELS, dtype=int)})
    for level in map(int, levels):
        division = least.copy()
        division.move_out(level)
        for found in (division, everything) if level == high else (division,):
            total = found.arena_load() + found.peak
            entry = (total, len(found.away), Beside(frozenset(found.away), found.peak))
            if best is None or entry[:2] < best[:2]:
                best = entry
    assert best is not None
    return best[2]


class _Division:
    """Bytes beside the arena at every position, for a set of storages outside of it."""

    def __init__(
        self,
        problem: OrderProblem,
        order: Sequence[int],
        away: frozenset[int],
        placed_workspace: Sequence[int],
        plain_workspace: Sequence[int],
    ) -> None:
        self.problem, self.order = problem, list(order)
        self.placed, self.plain = placed_workspace, plain_workspace
        self.times = lifetimes(problem, order, away)
        self.away: set[int] = set()
        self.position = {v: i for i, v in enumerate(order)}
        self.maker = {s: v for v in order for s in problem.makes[v]}
        self.beside = np.array([placed_workspace[v] for v in order], np.int64)
        for s in sorted(away):
            if s in self.maker:
                self._put_out(s)

    def copy(self) -> _Division:
        new = _Division.__new__(_Division)
        new.__dict__.update(self.__dict__)
        new.away, new.beside = set(self.away), self.beside.copy()
        return new

    @property
    def peak(self) -> int:
        return int(self.beside.max(initial=0))

    def _change(self, s: int) -> tuple[int, int, int]:
        """First position, the one after the last, and the workspace that changes at the first."""
        v = self.maker[s]
        return self.times.lower[s], self.times.upper[s], self.plain[v] - self.placed[v]

    def _put_out(self, s: int) -> None:
        lower, upper, change = self._change(s)
        self.away.add(s)
        self.beside[lower:upper] += self.problem.sizes[s]
        if set(self.problem.makes[self.maker[s]]) <= self.away:
            self.beside[lower] += change

    def move_out(self, level: int) -> None:
        """Take results out, large ones first, while no more than ``level`` is needed at once."""
        ranked = sorted(self.maker, key=lambda s: (-self.problem.sizes[s], s))
        for s in ranked:
            if s in self.away or not self.problem.sizes[s]:
                continue
            lower, upper, change = self._change(s)
            trial = self.beside[lower:upper] + self.problem.sizes[s]
            trial[0] += change
            if trial.max() <= level:
                self._put_out(s)

    def arena_load(self) -> int:
        """The most bytes alive in the arena, memory that is taken over counted once."""
        times = lifetimes(self.problem, self.order, self.away)
        load = np.zeros(len(self.order) + 1, np.int64)
        for s, lower in times.lower.items():
            if s in self.away:
                continue
            first = lower + 1 if s in times.taken else lower
            load[first] += self.problem.sizes[s]
            load[times.upper[s]] -= self.problem.sizes[s]
        return int(np.cumsum(load).max(initial=0))
