"""A layout problem in small integers: what the exact search and the integer program read.

Offsets are counted in grains, the largest unit in which some best layout can be written. Time is
cut into sections, steps with a constant set of live items, of which only those are kept whose
live set is in no other: the rest say nothing new.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

import numpy as np
from numpy.typing import NDArray

from mopt.memory import Storage


@dataclass(frozen=True)
class Item:
    """Something to place: ``size`` and ``fixed`` (-1: anywhere) in grains.

    ``bytes`` is its real size, ``spans`` the intervals of steps it is alive in, and ``parts``
    which items of the original instance it stands for, each with its offset in it.
    """

    size: int
    align: int
    fixed: int
    bytes: int
    spans: tuple[tuple[int, int], ...]
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Instance:
    """Items and the unit of their offsets in bytes."""

    items: tuple[Item, ...]
    grain: int

    @cached_property
    def size(self) -> list[int]:
        """Sizes in grains."""
        return [item.size for item in self.items]

    @cached_property
    def fixed(self) -> list[int]:
        """Fixed offsets in grains, -1 for items that may move."""
        return [item.fixed for item in self.items]

    @cached_property
    def live(self) -> list[list[int]]:
        """The items alive in each section, in the order of time."""
        cuts = sorted({t for item in self.items for span in item.spans for t in span})
        index = {t: k for k, t in enumerate(cuts)}
        live: list[list[int]] = [[] for _ in cuts]
        for i, item in enumerate(self.items):
            for lower, upper in item.spans:
                for k in range(index[lower], index[upper]):
                    live[k].append(i)
        return _maximal(live)

    @cached_property
    def spans(self) -> list[list[int]]:
        """The sections of each item."""
        spans: list[list[int]] = [[] for _ in self.items]
        for t, live in enumerate(self.live):
            for i in live:
                spans[i].append(t)
        return spans

    def first(self, i: int) -> int:
        """The first section of an item."""
        return self.spans[i][0]

    def last(self, i: int) -> int:
        """One past the last section of an item."""
        return self.spans[i][-1] + 1

    @cached_property
    def overlaps(self) -> list[NDArray[np.int64]]:
        """For each item the others that are alive in one of its sections."""
        first = np.array([self.first(i) for i in range(len(self.items))])
        last = np.array([self.last(i) for i in range(len(self.items))])
        broken = {i for i, item in enumerate(self.items) if len(item.spans) > 1}
        found = []
        for i in range(len(self.items)):
            near = np.flatnonzero((first < last[i]) & (last > first[i]))
            near = near[near != i]
            if i in broken or broken:
                own = set(self.spans[i])
                check = [j for j in near if i in broken or j in broken]
                apart = [j for j in check if own.isdisjoint(self.spans[j])]
                near = near[~np.isin(near, apart)]
            found.append(near)
        return found

    def near(self, i: int) -> Iterable[int]:
        """The items that may not share bytes with this one."""
        return (int(j) for j in self.overlaps[i])

    def entries(self) -> int:
        """At most how many pairs there are of items alive together, and of items and sections.

        Cheap, and known before the lists that hold them are made.
        """
        lower = np.array([item.spans[0][0] for item in self.items])
        upper = np.array([item.spans[-1][1] for item in self.items])
        starts, ends = np.sort(lower), np.sort(upper)
        begun = np.searchsorted(starts, upper, "left")
        over = np.searchsorted(ends, lower, "right")
        # A section that is kept begins with the start of an item.
        first = np.searchsorted(starts, lower, "left")
        return int(np.sum(begun - over) + np.sum(begun - first))

    @cached_property
    def walls(self) -> list[list[tuple[int, int]]]:
        """For each item the bytes of fixed ones it overlaps: (first, end) in grains, sorted."""
        if all(fixed < 0 for fixed in self.fixed):
            return [[] for _ in self.items]
        return [
            sorted(
                (self.fixed[j], self.fixed[j] + self.size[j])
                for j in self.near(i)
                if self.fixed[j] >= 0
            )
            for i in range(len(self.items))
        ]

    def fit(self, i: int, value: int) -> int:
        """The least legal offset of an item that is at least ``value``."""
        align = self.items[i].align
        value = -(-value // align) * align
        for low, top in self.walls[i]:
            if top > value:
                if low >= value + self.size[i]:
                    break
                value = -(-top // align) * align
        return value

    def limits(self, capacity: int) -> list[int]:
        """The highest offset of each item that keeps it within ``capacity`` bytes."""
        return [(capacity - item.bytes) // self.grain for item in self.items]

    def room(self, capacity: int) -> int:
        """The highest end of any item within ``capacity`` bytes, in grains."""
        pairs = zip(self.limits(capacity), self.items, strict=True)
        return max((limit + item.size for limit, item in pairs), default=0)


def _maximal(live: list[list[int]]) -> list[list[int]]:
    """Drop each section whose live set is within that of the one before or after it."""
    kept: list[list[int]] = []
    for section in live:
        if not section:
            # Parts of time with nothing alive between them stay apart without an empty section.
            continue
        members = set(section)
        if kept and members.issubset(kept[-1]):
            continue
        while kept and members.issuperset(kept[-1]):
            kept.pop()
        kept.append(section)
    return kept


def make_instance(storages: Sequence[Storage]) -> Instance:
    """The storages that take room, in their order, as items.

    Bytes that a storage gives away during a gap with a window are not counted as free here, so a
    layout found is legal, but that none exists would not be a proof.
    """
    lowest = [s.alignment for s in storages if s.offset is None]
    lowest += [_lowest_bit(x) for s in storages if s.offset is not None
               for x in (s.offset, s.offset + s.size) if x]  # fmt: skip
    step = min(lowest, default=1)
    sizes = [-(-s.size // step) * step for s in storages]
    unit = gcd(*sizes, *(s.offset for s in storages if s.offset))
    if any(unit % s.alignment for s in storages):
        unit = _lowest_bit(unit)
    items = [
        Item(
            size // unit,
            1 if storage.offset is not None else max(1, storage.alignment // unit),
            -1 if storage.offset is None else storage.offset // unit,
            storage.size,
            _spans(storage),
            ((k, 0),),
        )
        for k, (storage, size) in enumerate(zip(storages, sizes, strict=True))
    ]
    return Instance(tuple(items), unit)


def _lowest_bit(value: int) -> int:
    return value & -value


def _spans(storage: Storage) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for piece in storage.pieces:
        if spans and spans[-1][1] == piece.lower:
            spans[-1] = (spans[-1][0], piece.upper)
        else:
            spans.append((piece.lower, piece.upper))
    return tuple(spans)
