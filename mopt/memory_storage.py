"""Buffers that share memory, folded into the units that get an offset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mopt.errors import InputError, quote

if TYPE_CHECKING:
    from mopt.memory import Buffer


@dataclass(frozen=True)
class Piece:
    """Bytes ``[first, end)`` of a storage, counted from its offset, busy in ``[lower, upper)``."""

    lower: int
    upper: int
    first: int
    end: int


@dataclass(frozen=True)
class Storage:
    """A buffer together with all that alias it: the unit that gets one offset.

    One that never needs a byte has no pieces and size 0.
    """

    id: str
    members: tuple[str, ...]
    size: int
    alignment: int
    pieces: tuple[Piece, ...]
    tier: str
    offset: int | None
    hint: int | None


def fold(base: Buffer, members: Sequence[Buffer]) -> Storage:
    """The storage of ``base``; ``members`` are all that lie in it, itself included.

    Raises InputError (``alias-mismatch``) where they are fixed at different offsets.
    """
    fixed = {b.offset for b in members if b.offset is not None}
    if len(fixed) > 1:
        raise InputError(
            f"buffer {quote(base.id)} and its aliases are fixed at {len(fixed)} offsets",
            code="alias-mismatch",
        )
    alignment = max(b.alignment for b in members)
    if fixed and min(fixed) % alignment:
        raise InputError(
            f"buffer {quote(base.id)} is fixed at {min(fixed)}, no multiple of the alignment "
            f"{alignment} of one of its aliases",
            code="alias-mismatch",
        )
    hints = [b.hint for b in members if b.hint is not None]
    pieces = tuple(_joined(_needs(base, members))) if base.size else ()
    return Storage(
        base.id,
        tuple(b.id for b in members),
        base.size if pieces else 0,
        alignment,
        pieces,
        base.tier,
        fixed.pop() if fixed else None,
        hints[0] if hints else None,
    )


def _needs(base: Buffer, members: Sequence[Buffer]) -> Iterator[Piece]:
    """Which bytes are busy between any two events. Between its members' lives all are kept."""
    ends = {t for b in members for t in (b.lower, b.upper)}
    cuts = sorted(ends | {t for b in members for g in b.gaps for t in (g.lower, g.upper)})
    for lower, upper in pairwise(cuts):
        windows = [_window(b, lower, base.size) for b in members if b.lower <= lower < b.upper]
        used = [w for w in windows if w] if windows else [(0, base.size)]
        if used:
            yield Piece(lower, upper, min(first for first, _ in used), max(end for _, end in used))


def _window(buffer: Buffer, step: int, size: int) -> tuple[int, int] | None:
    for gap in buffer.gaps:
        if gap.lower <= step < gap.upper:
            return gap.window
    return (0, size)


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    last: Piece | None = None
    for piece in pieces:
        if last and (last.upper, last.first, last.end) == (piece.lower, piece.first, piece.end):
            last = Piece(last.lower, piece.upper, last.first, last.end)
            continue
        if last:
            yield last
        last = piece
    if last:
        yield last
