"""The exact layout search in plain Python: what the compiled loop does, written to be read.

The search asks for offsets within a capacity. Placed items form a skyline; the *sky* of an
unplaced item is the least legal offset on top of every placed item it overlaps in time. A node
takes one item and decides

* place: it lies on its sky, and whatever is unplaced and overlaps it comes above it;
* postpone: it does not, so something unplaced comes under it or pushes it up.

If there is a layout within the capacity, there is one in which no item can be lowered (take the
one with the least sum of offsets), so nothing else need be tried. Each item keeps a *bound* on its
offset: its sky, or more once it was postponed. Then it must rest on an unplaced item, so its
bound is at least the least (bound + size) among those, and one of them must intrude on the room
it had, or lowering it would be free. This "schedule or postpone" scheme is known from constraint
scheduling (Le Pape et al., ECAI 1994); MiniMalloc's canonical order (Moffitt, ASPLOS 2023) is the
special case that always takes the lowest item first.

A node fails when in some section (a step with a constant set of live items) the unplaced items,
each no lower than its bound, stack beyond the capacity: one machine with release dates, solved
exactly by the order of the bounds. Parts of time that no unplaced item spans any more are searched
one by one, and a part that fails undoes the decision that cut it off, not the other parts.

Which item comes next: the least of ``sky + lean * slack`` over the sections, where slack is what
the section has left, then the least ``rank``. ``lean`` 0 builds the layout from the bottom up;
larger ones work ahead where there is little room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mopt.passes.schedule._instance import Instance

SOLVED, REFUTED, LIMIT, ROOM = 0, 1, 2, 3
# Postponed items may push each other up in turn; more rounds than this are never worth it.
ROUNDS = 16


class Twin:
    """One search: ``run`` is what ``_search_kernel.search`` computes, nodes included."""

    def __init__(self, instance: Instance, capacity: int, rank: Sequence[int], lean: float) -> None:
        self.instance, self.capacity, self.rank, self.lean = instance, capacity, rank, lean
        items = range(len(instance.size))
        self.limit = instance.limits(capacity)
        self.capacity = instance.room(capacity)
        self.free = {i for i in items if instance.fixed[i] < 0}
        self.sky = {i: instance.fit(i, 0) for i in self.free}
        self.bound = dict(self.sky)
        self.soft: set[int] = set()
        self.offset = {i: instance.fixed[i] for i in items if i not in self.free}

    def run(self, max_nodes: int) -> tuple[int, int, list[int]]:
        """(SOLVED, REFUTED or LIMIT, nodes, offsets)."""
        self.nodes, self.max_nodes = 0, max_nodes
        if any(self.sky.get(i, o) > self.limit[i] for i, o in enumerate(self.instance.fixed)):
            return REFUTED, 0, []
        try:
            solved = self._solve(0, len(self.instance.live))
        except _OutOfNodesError:
            return LIMIT, self.nodes, []
        if not solved:
            return REFUTED, self.nodes, []
        return SOLVED, self.nodes, [self.offset[i] for i in range(len(self.offset))]

    def _solve(self, a: int, b: int) -> bool:
        """Lay out the unplaced items of ``[a, b)``; on failure everything is as before."""
        self.nodes += 1
        if self.nodes > self.max_nodes:
            raise _OutOfNodesError
        before = self._snapshot()
        if self._propagate(a, b):
            parts = self._parts(a, b)
            if not parts:
                return True
            if self._decide(*parts[0]) and all(self._solve(*part) for part in parts[1:]):
                return True
        self._restore(before)
        return False

    def _decide(self, a: int, b: int) -> bool:
        i = self._choose(a, b)
        if i is None:
            return False
        final = self._is_free_below(i)
        before = self._snapshot()
        if self._place(i) and self._solve(a, b):
            return True
        self._restore(before)
        if final:
            self.bound[i] = self.instance.fit(i, self.sky[i] + 1)
        else:
            # Something could still slip under this item, so it may come to lie here after that.
            self.soft.add(i)
        return self._solve(a, b)

    def _snapshot(self) -> tuple[set[int], dict[int, int], dict[int, int], set[int]]:
        return set(self.free), dict(self.sky), dict(self.bound), set(self.soft)

    def _restore(self, saved: tuple[set[int], dict[int, int], dict[int, int], set[int]]) -> None:
        free, sky, bound, soft = saved
        self.free, self.sky, self.bound, self.soft = set(free), dict(sky), dict(bound), set(soft)

    def _waiting(self, t: int) -> list[int]:
        return [i for i in self.instance.live[t] if i in self.free]

    def _place(self, i: int) -> bool:
        self.offset[i] = self.sky[i]
        top = self.sky[i] + self.instance.size[i]
        self.free.discard(i)
        for j in self.instance.near(i):
            if j in self.free:
                self.soft.discard(j)
                self.sky[j] = max(self.sky[j], self.instance.fit(j, top))
                self.bound[j] = max(self.bound[j], self.sky[j])
        return all(self.bound[j] <= self.limit[j] for j in self.free)

    def _propagate(self, a: int, b: int) -> bool:
        for _ in range(ROUNDS):
            if not self._sections_hold(a, b):
                return False
            before = dict(self.bound)
            for i in sorted(self.free):
                if self.bound[i] > self.sky[i] and a <= self.instance.first(i) < b:
                    value = self._wait(i)
                    if value is None or max(value, self.bound[i]) > self.limit[i]:
                        return False
                    self.bound[i] = max(self.bound[i], value)
            if self.bound == before:
                break
        return self._sections_hold(a, b)

    def _wait(self, i: int) -> int | None:
        others = [j for j in self.instance.near(i) if j in self.free]
        intrude = self.sky[i] + self.instance.size[i]
        if not any(self.bound[j] < intrude for j in others):
            return None
        return self.instance.fit(i, min(self.bound[j] + self.instance.size[j] for j in others))

    def _sections_hold(self, a: int, b: int) -> bool:
        for t in range(a, b):
            live = [(self.bound[i], self.instance.size[i]) for i in self._waiting(t)]
            live += [
                (self.offset[i], self.instance.size[i])
                for i in self.instance.live[t]
                if self.instance.fixed[i] >= 0
            ]
            top = 0
            for bound, size in sorted(live):
                top = max(top, bound) + size
            if top > self.capacity:
                return False
        return True

    def _slack(self, t: int) -> int:
        live = [i for i in self.instance.live[t] if i in self.free or self.instance.fixed[i] >= 0]
        low = min(self.bound[i] for i in self._waiting(t))
        return self.capacity - low - sum(self.instance.size[i] for i in live)

    def _parts(self, a: int, b: int) -> list[tuple[int, int]]:
        parts: list[tuple[int, int, int]] = []
        t = a
        while t < b:
            if not self._waiting(t):
                t += 1
                continue
            start, end, slack = t, t + 1, self.capacity
            while t < end:
                if waiting := self._waiting(t):
                    end = max(end, *(self.instance.last(i) for i in waiting))
                    slack = min(slack, self._slack(t))
                t += 1
            parts.append((slack, -start, end))
        return [(-start, end) for _, start, end in sorted(parts)]

    def _choose(self, a: int, b: int) -> int | None:
        best: tuple[float, int, int] | None = None
        for t in range(a, b):
            ready = [
                (self.sky[i], self.rank[i], i)
                for i in self._waiting(t)
                if self.bound[i] == self.sky[i] and i not in self.soft
            ]
            if ready:
                sky, rank, i = min(ready)
                score = (sky + self.lean * self._slack(t), rank, i)
                best = score if best is None else min(best, score)
        return best[2] if best else None

    def _is_free_below(self, i: int) -> bool:
        return all(
            self.bound[j] + self.instance.size[j] > self.sky[i]
            for j in self.instance.near(i)
            if j in self.free
        )


class _OutOfNodesError(Exception):
    """Unwinds the walk."""
