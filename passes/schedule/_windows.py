"""Layouts of many storages made lower around their top: a few are taken out and searched again.

The rest stays where it is. What lies above the target goes, with what is alive near it, the
short-lived first, because long lives hold everything else in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mopt.memory import Storage
from mopt.passes.schedule import _greedy
from mopt.passes.schedule._instance import Instance, make_instance
from mopt.passes.schedule._run import SOLVED, Clock, Guide, Ready, run

# Storages that are taken out at once: few first, more where that does not help.
_SIZES = (40, 80, 120)
# Nodes of a search for each storage that is taken out, and orders that are tried.
_NODES, _TRIES = 40, 4
# How far below the top the first target is, and the last: shares of the way to the bound.
_FIRST, _LAST = 0.1, 0.002
# Storages above the target that are worth the trouble: each takes a search of its own.
_MOST_TOPS = 60

Offsets = Mapping[str, int]
# A guide for an instance from a number of the try.
Guides = Callable[[Instance, int], Guide]


class Windows:
    """Storages of one stretch of time; ``lower`` makes layouts of them lower."""

    def __init__(
        self, storages: Sequence[Storage], clock: Clock, rng: np.random.Generator, guides: Guides
    ) -> None:
        self.storages, self.clock, self.rng, self.guides = list(storages), clock, rng, guides
        self.first = np.array([s.pieces[0].lower for s in storages])
        self.last = np.array([s.pieces[-1].upper for s in storages])
        self.size = np.array([s.size for s in storages])
        self.may_move = np.array([s.offset is None for s in storages])

    def lower(self, offsets: Offsets, floor: int) -> dict[str, int]:
        """The layout, or a lower one; nothing below ``floor`` is tried."""
        best = dict(offsets)
        peak = _greedy.top_of(self.storages, best)
        share = _FIRST
        while share >= _LAST and peak > floor and not self.clock.is_over():
            target = peak - max(1, int(share * (peak - floor)))
            found = self._below(best, target)
            if found is None:
                share /= 3
            else:
                best, peak = found, _greedy.top_of(self.storages, found)
        return best

    def _below(self, offsets: Offsets, target: int) -> dict[str, int] | None:
        """A layout that ends at ``target`` or lower, None where some top found no other place."""
        at = np.array([offsets[s.id] for s in self.storages])
        above = np.flatnonzero(at + self.size > target)
        if len(above) > _MOST_TOPS:
            return None
        while len(above):
            if self.clock.is_over():
                return None
            top = int(above[self.rng.integers(len(above))])
            if not any(self._move(at, top, target, count) for count in _SIZES):
                return None
            above = np.flatnonzero(at + self.size > target)
        return {s.id: int(offset) for s, offset in zip(self.storages, at, strict=True)}

    def _move(self, at: np.ndarray, top: int, target: int, count: int) -> bool:
        """Place ``top`` and up to ``count`` others again so that they end at ``target``."""
        away = np.maximum(0, np.maximum(self.first - self.last[top], self.first[top] - self.last))
        ranked = np.lexsort((self.last - self.first, away))
        free = np.zeros(len(at), bool)
        free[[k for k in ranked if self.may_move[k]][:count]] = True
        # What is above the target and alive with them could stay nowhere.
        high = at + self.size > target
        free |= high & self._near(free) & self.may_move
        if not free[top]:
            return False
        chosen = np.flatnonzero(free | self._near(free))
        if (high & ~free)[chosen].any():
            return False
        instance = make_instance([
            self.storages[k] if free[k] else replace(self.storages[k], offset=int(at[k]))
            for k in chosen
        ])  # fmt: skip
        ready = Ready(instance)
        if ready.is_too_large:
            return False
        for number in range(_TRIES):
            guide = self.guides(instance, number)
            answer, grains = run(ready, target, guide, _NODES * int(free.sum()), self.clock)
            if answer == SOLVED:
                at[chosen] = np.array(grains) * instance.grain
                return True
        return False

    def _near(self, free: np.ndarray) -> np.ndarray:
        """What is alive together with some of the ``free``."""
        found = np.zeros(len(free), bool)
        for k in np.flatnonzero(free):
            found |= (self.first < self.last[k]) & (self.last > self.first[k])
        return found
