"""Smaller instances whose layouts are layouts of the given one: items glued into larger blocks.

Where no room is wasted at a step, what ends there and what starts there cover the same addresses.
So if one item ends, one of the same size starts and nothing else changes, the second takes the
place of the first, and both are one longer item; if several of one span end or start and the
totals agree, all of them are one block. Undoing such cuts again and again turns tight packings of
hundreds of items into a few dozen. Where room is wasted the same gluing is a guess, a good one for
memory that was laid out with care, and a search on the glued instance says quickly whether it was
right. It can only find layouts: that none exists says nothing about the instance it came from.

``fill_to`` first turns the room that must stay free at a given height into items of its own
wherever a rise of the free room is undone by an equal fall later, as it is when something was left
out of a tight packing.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from heapq import heappop, heappush

from mopt.passes.schedule._instance import Instance, Item

BLOCKS, PAIRS, STACKS, GUESSES = 1, 2, 3, 4


def contract(instance: Instance, level: int, fill_to: int | None = None, seed: int = 0) -> Instance:
    """Glue items; ``parts`` of the result name items of ``instance``.

    BLOCKS glues what must lie together if no room is wasted. PAIRS also guesses which of several
    items ending and starting at a step belong together, by equal and unique sizes. STACKS also
    puts items with the same span on each other. GUESSES takes any of several equal sizes, by
    ``seed``. ``fill_to`` is a height in grains.
    """
    items = [
        Item(x.size, x.align, x.fixed, x.bytes, x.spans, ((i, 0),))
        for i, x in enumerate(instance.items)
    ]
    if fill_to is not None:
        items += _free_room(instance, fill_to)
    glue = _Glue(items, instance.grain, random.Random(seed) if level == GUESSES else None)
    glue.run(level)
    kept = [item for item in glue.items.values() if item.parts]
    return Instance(tuple(kept), instance.grain)


def unfold(glued: Instance, offsets: Sequence[int], count: int) -> list[int]:
    """The offsets of the ``count`` items that a glued instance was made from."""
    result = [0] * count
    for item, offset in zip(glued.items, offsets, strict=True):
        for i, relative in item.parts:
            result[i] = offset + relative
    return result


def _free_room(instance: Instance, height: int) -> list[Item]:
    """Items for room that stays free: each rise of it matched with an equal later fall."""
    change: Counter[int] = Counter()
    for item in instance.items:
        for lower, upper in item.spans:
            change[lower] -= item.size
            change[upper] += item.size
    steps = sorted(change)
    if not steps:
        return []
    change[steps[0]] += height
    change[steps[-1]] -= height
    found: list[Item] = []
    rises: list[tuple[int, int]] = []
    for step in steps:
        if change[step] > 0:
            rises.append((step, change[step]))
        elif change[step] < 0:
            fall = -change[step]
            for used in _matching(rises, fall):
                start, size = rises[used]
                taken = min(size, fall)
                found.append(_filler(taken, start, step, instance.grain))
                if size > taken:
                    rises[used] = (start, size - taken)
                else:
                    rises.pop(used)
                fall -= taken
    return found


def _matching(rises: Sequence[tuple[int, int]], fall: int) -> list[int]:
    """Which rises a fall undoes: one of its size, two that add up to it, or part of a larger one.

    Indices from the last to the first, so that removing one keeps the others valid.
    """
    recent = range(len(rises) - 1, -1, -1)
    for k in recent:
        if rises[k][1] == fall:
            return [k]
    where = {rises[k][1]: k for k in range(len(rises))}
    for k in recent:
        other = where.get(fall - rises[k][1])
        if other is not None and other != k:
            return sorted((k, other), reverse=True)
    return next(([k] for k in recent if rises[k][1] > fall), [])


def _filler(size: int, lower: int, upper: int, grain: int) -> Item:
    return Item(size, 1, -1, size * grain, ((lower, upper),), ())


class _Glue:
    """Items by number, and which of those that can be glued end and start at each step."""

    def __init__(self, items: Sequence[Item], grain: int, rng: random.Random | None) -> None:
        self.rng = rng
        self.items = dict(enumerate(items))
        self.grain = grain
        self.next = len(items)
        self.ends: defaultdict[int, list[int]] = defaultdict(list)
        self.starts: defaultdict[int, list[int]] = defaultdict(list)
        self.alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        self.todo: list[int] = []
        self.spans: list[tuple[int, int, int]] = []
        # Steps at which something that cannot be glued starts or ends: there sums prove nothing.
        self.blocked: set[int] = set()
        for i, item in self.items.items():
            if item.fixed < 0 and item.align == 1 and len(item.spans) == 1:
                self._enter(i)
            else:
                self.blocked.update(t for span in item.spans for t in span)

    def run(self, level: int) -> None:
        """Glue until no rule of the level applies."""
        while True:
            while self.todo:
                step = heappop(self.todo)
                while self.todo and self.todo[0] == step:
                    heappop(self.todo)
                while step not in self.blocked and self._glue_at(step, level):
                    pass
            if level >= STACKS and self._stack_shortest():
                continue
            if not self._guess():
                return

    def _glue_at(self, step: int, level: int) -> bool:
        ends, starts = self.ends[step], self.starts[step]
        if not ends or not starts:
            return False
        if self._sum(ends) == self._sum(starts):
            lowers = {self._span(i)[0] for i in ends}
            uppers = {self._span(i)[1] for i in starts}
            if len(lowers) == len(uppers) == 1:
                self._join(tuple(ends), tuple(starts))
                return True
        if level < PAIRS:
            return False
        return self._join_largest(
            self._groups(ends, 0), self._groups(starts, 1)
        ) or self._join_largest([(i,) for i in ends], [(i,) for i in starts])

    def _groups(self, ids: Sequence[int], side: int) -> list[tuple[int, ...]]:
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for i in ids:
            groups[self._span(i)[side]].append(i)
        return [tuple(group) for group in groups.values()]

    def _join_largest(
        self, before: Sequence[tuple[int, ...]], after: Sequence[tuple[int, ...]]
    ) -> bool:
        """Join the largest two stacks of equal size that occurs once on either side."""
        sizes = Counter(self._sum(ids) for ids in before)
        sizes_after = Counter(self._sum(ids) for ids in after)
        once = [z for z in sizes if sizes[z] == 1 and sizes_after.get(z) == 1]
        if not once:
            return False
        size = self.rng.choice(once) if self.rng else max(once)
        self._join(
            next(ids for ids in before if self._sum(ids) == size),
            next(ids for ids in after if self._sum(ids) == size),
        )
        return True

    def _guess(self) -> bool:
        """Glue an item to any of several of its size that start where it ends."""
        if self.rng is None:
            return False
        steps = [t for t, ends in self.ends.items() if ends and t not in self.blocked]
        for step in self.rng.sample(steps, len(steps)):
            starts = self.starts[step]
            sizes = {self.items[i].size for i in starts}
            before = [i for i in self.ends[step] if self.items[i].size in sizes]
            if before:
                first = self.rng.choice(before)
                equal = [i for i in starts if self.items[i].size == self.items[first].size]
                self._join((first,), (self.rng.choice(equal),))
                return True
        return False

    def _stack_shortest(self) -> bool:
        """Put the items with the shortest span that several share on each other."""
        while self.spans:
            _, lower, upper = heappop(self.spans)
            ids = self.alike[lower, upper]
            if len(ids) > 1:
                self._join(tuple(ids), ())
                return True
        return False

    def _join(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Glue two stacks that follow each other in time, or one stack alone, into one item."""
        lower = self._span(before[0])[0]
        upper = self._span((after or before)[0])[1]
        parts: list[tuple[int, int]] = []
        real = 0
        for stack in (before, after):
            top = 0
            for i in stack:
                item = self.items[i]
                parts += [(k, top + offset) for k, offset in item.parts]
                # What counts against the capacity is where the last real byte is.
                real = max(real, top * self.grain + item.bytes)
                top += item.size
        size = self._sum(before)
        for i in (*before, *after):
            span = self._span(i)
            self.starts[span[0]].remove(i)
            self.ends[span[1]].remove(i)
            self.alike[span].remove(i)
            del self.items[i]
        self.items[self.next] = Item(size, 1, -1, real, ((lower, upper),), tuple(parts))
        self._enter(self.next)
        self.next += 1

    def _enter(self, i: int) -> None:
        lower, upper = self._span(i)
        self.starts[lower].append(i)
        self.ends[upper].append(i)
        self.alike[lower, upper].append(i)
        heappush(self.todo, lower)
        heappush(self.todo, upper)
        if len(self.alike[lower, upper]) > 1:
            heappush(self.spans, (upper - lower, lower, upper))

    def _span(self, i: int) -> tuple[int, int]:
        return self.items[i].spans[0]

    def _sum(self, ids: Sequence[int]) -> int:
        return sum(self.items[i].size for i in ids)
