"""Lower bounds on the size of a layout, from what is alive together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mopt.memory import Load, Piece, Storage

Ints = NDArray[np.int64]
# Moments looked at closely; only alignment makes the first few differ from the best.
_MOMENTS = 256


def lower_bound(storages: Sequence[Storage]) -> Load:
    """Bytes that no layout goes below, and the moment and storages that say so.

    The largest of: the sizes alive at one moment; the same with sizes rounded up to the least
    alignment there, but for one storage, which may lie on top; the end of a fixed storage.
    """
    best = Load(0, 0, 0, ())
    for s in storages:
        if s.size and s.offset is not None and s.offset + s.size > best.bytes:
            best = Load(s.offset + s.size, s.pieces[0].lower, s.pieces[0].upper, (s.id,))
    busy = [(s, p) for s in storages if s.size for p in s.pieces]
    if not busy:
        return best
    cuts = np.unique([t for _, p in busy for t in (p.lower, p.upper)])
    lower = np.searchsorted(cuts, [p.lower for _, p in busy])
    upper = np.searchsorted(cuts, [p.upper for _, p in busy])
    plain = _alive(np.array([p.end - p.first for _, p in busy], np.int64), lower, upper, len(cuts))
    most = _most_possible(busy, lower, upper, len(cuts))
    moments = [int(np.argmax(plain)), *np.argsort(-most, kind="stable")[:_MOMENTS]]
    for t in moments:
        if most[t] <= best.bytes:
            continue
        alive = [busy[k] for k in np.flatnonzero((lower <= t) & (t < upper))]
        needed = _needed(alive)
        if needed > best.bytes:
            ids = tuple(s.id for s, _ in alive)
            best = Load(needed, int(cuts[t]), int(cuts[t + 1]), ids)
    return best


def _most_possible(
    busy: Sequence[tuple[Storage, Piece]], lower: Ints, upper: Ints, moments: int
) -> Ints:
    """For each moment at least what ``_needed`` says, computed for all at once."""
    most = np.zeros(moments, np.int64)
    alignments = sorted({s.alignment for s, _ in busy})
    for align in alignments:
        taken = np.array([_round_up(p.end - p.first, align) for _, p in busy], np.int64)
        load = _alive(taken, lower, upper, moments)
        present = np.array([s.alignment == align for s, _ in busy], np.int64)
        most = np.where(_alive(present, lower, upper, moments) > 0, np.maximum(most, load), most)
    return most


def _alive(values: Ints, lower: Ints, upper: Ints, moments: int) -> Ints:
    change = np.zeros(moments + 1, np.int64)
    np.add.at(change, lower, values)
    np.subtract.at(change, upper, values)
    return np.cumsum(change)[:moments]


def _needed(alive: Sequence[tuple[Storage, Piece]]) -> int:
    """What storages alive together take at least."""
    plain = sum(p.end - p.first for _, p in alive)
    if any(p.end - p.first < s.size for s, p in alive):
        return plain
    # Every offset is a multiple of the least alignment, so below another storage each one takes
    # a multiple of it too.
    step = min(s.alignment for s, _ in alive)
    padding = [_round_up(s.size, step) - s.size for s, _ in alive]
    return plain + sum(padding) - max(padding)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
