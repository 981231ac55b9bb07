"""Layouts made by placing storages one after another.

Every rule here is fast and none proves anything: the bound does, when a layout meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mopt.memory import Storage

Ints = NDArray[np.int64]
Offsets = dict[str, int]
_CHECK_EVERY = 64


@dataclass(frozen=True)
class Rule:
    """An order of placing, and whether a storage takes the first gap or the tightest."""

    name: str
    order: tuple[int, ...]
    best_fit: bool


def rules(storages: Sequence[Storage]) -> Iterator[Rule]:
    """The portfolio, the rules that win most often first."""
    contention = _contention(storages)

    def duration(k: int) -> int:
        return storages[k].pieces[-1].upper - storages[k].pieces[0].lower

    keys: dict[str, Callable[[int], tuple[int, ...]]] = {
        "size": lambda k: (-storages[k].size, -duration(k)),
        "duration": lambda k: (-duration(k), -storages[k].size),
        "area": lambda k: (-storages[k].size * duration(k),),
        "contention": lambda k: (-contention[k], -storages[k].size),
        "start": lambda k: (storages[k].pieces[0].lower, -storages[k].size),
        "end": lambda k: (-storages[k].pieces[-1].upper, -storages[k].size),
    }
    movable = [k for k, s in enumerate(storages) if s.size and s.offset is None]
    for best_fit in (False, True):
        for name, key in keys.items():
            order = tuple(sorted(movable, key=lambda k: (*key(k), k)))
            yield Rule(f"{name}-{'best' if best_fit else 'first'}-fit", order, best_fit)


def _contention(storages: Sequence[Storage]) -> list[int]:
    """For each storage the largest load while it is alive."""
    cuts = np.unique([t for s in storages for p in s.pieces for t in (p.lower, p.upper)])
    load = np.zeros(len(cuts) + 1, np.int64)
    for s in storages:
        for p in s.pieces:
            load[np.searchsorted(cuts, p.lower) : np.searchsorted(cuts, p.upper)] += p.end - p.first
    most = []
    for s in storages:
        spans = [(np.searchsorted(cuts, p.lower), np.searchsorted(cuts, p.upper)) for p in s.pieces]
        most.append(int(max(load[a:b].max() for a, b in spans)))
    return most


class _Layout:
    """The pieces placed so far, sorted by address, so that gaps are found by one sweep."""

    def __init__(self, room: int) -> None:
        self.count = 0
        # Rows: lower and upper step, first and end address.
        self.rows = np.empty((4, room), np.int64)

    def put(self, storage: Storage, offset: int) -> None:
        for p in storage.pieces:
            row = (p.lower, p.upper, offset + p.first, offset + p.end)
            at = int(np.searchsorted(self.rows[2, : self.count], row[2]))
            self.rows[:, at + 1 : self.count + 1] = self.rows[:, at : self.count]
            self.rows[:, at] = row
            self.count += 1

    def find(self, storage: Storage, best_fit: bool, hint: int | None) -> int:
        """The least legal offset, or the one in the tightest gap."""
        lower, upper, first, end = self.rows[:, : self.count]
        # Offsets strictly between below[k] and above[k] would overlap piece k.
        below, above = [], []
        for p in storage.pieces:
            near = (lower < p.upper) & (upper > p.lower)
            below.append(first[near] - p.end)
            above.append(end[near] - p.first)
        lo, hi = below[0], above[0]
        if len(below) > 1:
            lo, hi = np.concatenate(below), np.concatenate(above)
            order = np.argsort(lo, kind="stable")
            lo, hi = lo[order], hi[order]
        if hint is not None and not np.any((lo < hint) & (hint < hi)):
            return hint
        tops = np.zeros(len(lo) + 1, np.int64)
        np.maximum.accumulate(hi, out=tops[1:])
        np.maximum(tops, 0, out=tops)
        align = storage.alignment
        starts = (tops + (align - 1)) // align * align
        fits = np.flatnonzero(starts[:-1] <= lo)
        if not len(fits):
            return int(starts[-1])
        if best_fit:
            return int(starts[fits[np.argmin(lo[fits] - starts[fits])]])
        return int(starts[fits[0]])


def place(
    storages: Sequence[Storage],
    order: Sequence[int],
    best_fit: bool,
    use_hints: bool = False,
    is_over: Callable[[], bool] | None = None,
) -> Offsets:
    """Offsets of all storages: the fixed ones where they must be, the others in ``order``.

    From when ``is_over()`` on, the rest goes on top of what lies in its steps.
    """
    layout = _Layout(sum(len(s.pieces) for s in storages))
    offsets = {s.id: 0 for s in storages}
    for s in storages:
        if s.offset is not None:
            offsets[s.id] = s.offset
            if s.size:
                layout.put(s, s.offset)
    for at, k in enumerate(order):
        if is_over and at % _CHECK_EVERY == _CHECK_EVERY - 1 and is_over():
            _stack(storages, order[at:], offsets)
            break
        s = storages[k]
        offsets[s.id] = layout.find(s, best_fit, s.hint if use_hints and _is_usable(s) else None)
        layout.put(s, offsets[s.id])
    return offsets


def _stack(storages: Sequence[Storage], rest: Sequence[int], offsets: Offsets) -> None:
    """Put each on top of all that lies in its steps, without looking for gaps below."""
    cuts = np.unique([t for s in storages for p in s.pieces for t in (p.lower, p.upper)])
    lower = np.searchsorted(cuts, [s.pieces[0].lower if s.pieces else 0 for s in storages])
    upper = np.searchsorted(cuts, [s.pieces[-1].upper if s.pieces else 0 for s in storages])
    height = np.zeros(len(cuts) + 1, np.int64)
    waiting = set(rest)
    for k, s in enumerate(storages):
        if k not in waiting and s.size:
            span = slice(lower[k], upper[k])
            height[span] = np.maximum(height[span], offsets[s.id] + s.size)
    for k in rest:
        s, span = storages[k], slice(lower[k], upper[k])
        offsets[s.id] = _round_up(int(height[span].max()), s.alignment)
        height[span] = offsets[s.id] + s.size


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _is_usable(storage: Storage) -> bool:
    return storage.hint is not None and storage.hint % storage.alignment == 0


def top_of(storages: Sequence[Storage], offsets: Offsets) -> int:
    """The end of the highest storage."""
    return max((offsets[s.id] + s.size for s in storages if s.size), default=0)
