"""Buffers, memory problems and memory plans: what has to be kept when, and where it goes.

Times are steps of an execution order: a buffer lives during the half-open interval
``[lower, upper)``, so one that ends at step 3 and one that starts there may share bytes. Sizes,
offsets and capacities are bytes (or any other unit, as long as it is one). Solvers live in
``mopt.passes.schedule``; ``mopt.memory_check.check_plan`` judges what they return, by other means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from typing import Any

from mopt.errors import InputError, quote
from mopt.memory_storage import Piece, Storage, fold

__all__ = [
    "LARGEST",
    "MAIN",
    "Buffer",
    "Gap",
    "Load",
    "MemoryPlan",
    "MemoryProblem",
    "Piece",
    "Status",
    "Storage",
    "Tier",
    "TierMove",
]

MAIN = "main"
# An exbibyte: sums of a few sizes and offsets stay in the signed 64 bits that compiled solvers use.
LARGEST = 2**60


@dataclass(frozen=True)
class Gap:
    """Steps ``[lower, upper)`` in which a buffer needs only the bytes ``window`` of itself.

    ``window`` is ``(first, end)`` relative to the buffer's offset; None means no byte at all.
    """

    lower: int
    upper: int
    window: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Fault:
    """One thing wrong with a buffer: which field, and what to say about it."""

    field: str
    code: str
    message: str
    hint: str | None = None


@dataclass(frozen=True)
class Buffer:
    """``size`` bytes that are needed during ``[lower, upper)``.

    ``alignment`` is a power of two that divides the offset. ``gaps`` are steps without use.
    ``tier`` names the memory the buffer lies in. ``alias`` is the id of a buffer whose storage
    this one uses: both get one offset, and the storage lives as long as any of them. ``offset``
    fixes the place, ``hint`` only proposes it. A zero-sized buffer takes no room anywhere.

    Raises InputError (``buffer-lifetime``, ``buffer-size``, ``buffer-alignment``, ``buffer-gap``,
    ``buffer-offset``) for values no plan could honour; its site is the field.
    """

    id: str
    lower: int
    upper: int
    size: int
    alignment: int = 1
    gaps: tuple[Gap, ...] = ()
    tier: str = MAIN
    alias: str | None = None
    offset: int | None = None
    hint: int | None = None

    def __post_init__(self) -> None:
        for fault in _faults(self):
            raise InputError(
                f"buffer {quote(self.id)}: {fault.message}",
                code=fault.code,
                hint=fault.hint,
                site=fault.field,
            )


def _faults(buffer: Buffer) -> Iterator[_Fault]:
    """Everything wrong with the fields of one buffer, in the order of the fields."""
    if buffer.lower < 0:
        yield _Fault(
            "lower",
            "buffer-lifetime",
            f"the lifetime starts at {buffer.lower}, steps count from 0",
        )
    if buffer.upper <= buffer.lower:
        kind = "empty" if buffer.upper == buffer.lower else "negative"
        yield _Fault(
            "upper",
            "buffer-lifetime",
            f"the lifetime [{buffer.lower}, {buffer.upper}) is {kind}",
            "the upper end is exclusive: a buffer used at step 3 only is [3, 4)",
        )
    for name in ("lower", "upper", "size", "alignment"):
        if getattr(buffer, name) > LARGEST:
            code = "buffer-lifetime" if name in ("lower", "upper") else f"buffer-{name}"
            value = getattr(buffer, name)
            yield _Fault(name, code, f"{name} {value} is beyond 2**60")
    if buffer.size < 0:
        yield _Fault("size", "buffer-size", f"size {buffer.size} is negative")
    if buffer.alignment < 1 or buffer.alignment & (buffer.alignment - 1):
        yield _Fault(
            "alignment",
            "buffer-alignment",
            f"alignment {buffer.alignment} is no power of two",
            "1 means anywhere",
        )
    yield from _gap_faults(buffer)
    for name in ("offset", "hint"):
        value = getattr(buffer, name)
        if value is not None and not 0 <= value <= LARGEST - max(buffer.size, 0):
            message = f"{name} {value} is negative or ends beyond 2**60"
            yield _Fault(name, "buffer-offset", message)
    if buffer.offset is not None and buffer.alignment > 0 and buffer.offset % buffer.alignment:
        yield _Fault(
            "offset",
            "buffer-offset",
            f"the fixed offset {buffer.offset} is no multiple of the alignment {buffer.alignment}",
        )


def _gap_faults(buffer: Buffer) -> Iterator[_Fault]:
    end = buffer.lower
    for gap in buffer.gaps:
        if not end <= gap.lower < gap.upper <= buffer.upper:
            message = (
                f"the gap [{gap.lower}, {gap.upper}) is empty, out of order or outside the "
                f"lifetime [{buffer.lower}, {buffer.upper})"
            )
            yield _Fault("gaps", "buffer-gap", message)
        end = max(end, gap.upper)
        if gap.window and not 0 <= gap.window[0] < gap.window[1] <= buffer.size:
            message = f"the window {gap.window} is empty or outside the {buffer.size} bytes"
            yield _Fault("gaps", "buffer-gap", message)


@dataclass(frozen=True)
class Tier:
    """A memory: its name and how many bytes it holds (None: as many as it takes)."""

    name: str
    capacity: int | None = None


@dataclass(frozen=True)
class Load:
    """Steps ``[lower, upper)`` in which the storages alive need ``bytes`` together."""

    bytes: int
    lower: int
    upper: int
    ids: tuple[str, ...]


@dataclass(frozen=True)
class MemoryProblem:
    """Buffers that must be given offsets, and the memories that hold them.

    ``capacity`` is that of the tier ``"main"``, where buffers lie unless they say otherwise; other
    tiers are listed in ``tiers``. ``order`` names the steps that the lifetimes count, where they
    have names. Raises InputError: ``duplicate-buffer``, ``unknown-buffer`` (an alias of nothing),
    ``alias-cycle``, ``alias-mismatch`` (larger, or in another tier), ``unknown-tier``,
    ``duplicate-tier``, ``memory-too-large`` (all sizes together beyond 2**60), ``capacity``.
    """

    buffers: tuple[Buffer, ...]
    capacity: int | None = None
    tiers: tuple[Tier, ...] = ()
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for tier in (Tier(MAIN, self.capacity), *self.tiers):
            if tier.capacity is not None and not 0 <= tier.capacity <= LARGEST:
                raise InputError(
                    f"capacity {tier.capacity} of tier {quote(tier.name)} is negative or beyond "
                    "2**60",
                    code="capacity",
                )
        by_id = self._by_id
        if len(by_id) < len(self.buffers):
            twice = Counter(b.id for b in self.buffers).most_common(1)[0][0]
            raise InputError(f"two buffers are called {quote(twice)}", code="duplicate-buffer")
        total = sum(b.size + b.alignment for b in self.buffers)
        total += max((b.offset for b in self.buffers if b.offset is not None), default=0)
        if total > LARGEST:
            raise InputError(
                f"the buffers need up to {total} bytes together, more than 2**60",
                code="memory-too-large",
            )
        known = {MAIN, *(tier.name for tier in self.tiers)}
        if len(known) <= len(self.tiers):
            raise InputError(
                f"two tiers have one name; {MAIN!r} is the one that `capacity` is about",
                code="duplicate-tier",
            )
        for buffer in self.buffers:
            if buffer.tier not in known:
                raise InputError(
                    f"buffer {quote(buffer.id)} lies in tier {quote(buffer.tier)}, known are "
                    f"{', '.join(sorted(known))}",
                    code="unknown-tier",
                )
            if buffer.alias is not None:
                self._check_alias(buffer)

    @cached_property
    def _by_id(self) -> dict[str, Buffer]:
        return {b.id: b for b in self.buffers}

    def _check_alias(self, buffer: Buffer) -> None:
        base, seen = buffer, {buffer.id}
        while base.alias is not None:
            if base.alias not in self._by_id:
                raise InputError(
                    f"buffer {quote(base.id)} is an alias of {quote(base.alias)}, which is missing",
                    code="unknown-buffer",
                )
            base = self._by_id[base.alias]
            if base.id in seen:
                raise InputError(
                    f"buffer {quote(buffer.id)} is an alias of itself through {len(seen)} buffers",
                    code="alias-cycle",
                )
            seen.add(base.id)
        if buffer.size > base.size or buffer.tier != base.tier:
            raise InputError(
                f"buffer {quote(buffer.id)} ({buffer.size} bytes, tier {buffer.tier}) cannot lie "
                f"in {quote(base.id)} ({base.size} bytes, tier {base.tier})",
                code="alias-mismatch",
            )

    def tier(self, name: str) -> Tier:
        """The memory of that name."""
        if name == MAIN:
            return Tier(MAIN, self.capacity)
        return next(tier for tier in self.tiers if tier.name == name)

    @cached_property
    def storages(self) -> tuple[Storage, ...]:
        """Aliases folded into what they alias, in the order of the buffers."""
        groups: dict[str, list[Buffer]] = {}
        for buffer in self.buffers:
            base = buffer
            while base.alias is not None:
                base = self._by_id[base.alias]
            groups.setdefault(base.id, []).append(buffer)
        order = [b.id for b in self.buffers if b.id in groups]
        return tuple(fold(self._by_id[root], groups[root]) for root in order)

    def peak_load(self, tier: str = MAIN) -> Load:
        """The first moment at which most bytes are alive in a tier; no plan needs less there.

        Alignment is not counted; the bound of a plan may be higher by what it costs.
        """
        pieces = [(p, s) for s in self.storages if s.tier == tier for p in s.pieces]
        change: dict[int, int] = {}
        for piece, _ in pieces:
            change[piece.lower] = change.get(piece.lower, 0) + piece.end - piece.first
            change[piece.upper] = change.get(piece.upper, 0) - piece.end + piece.first
        best = lower = upper = load = 0
        for moment, following in pairwise(sorted(change)):
            load += change[moment]
            if load > best:
                best, lower, upper = load, moment, following
        ids = [s.id for p, s in pieces if p.lower <= lower < p.upper] if best else []
        return Load(best, lower, upper, tuple(ids))


class Status(StrEnum):
    """What a plan proves: the least peak; that it fits; that nothing fits; or nothing in time."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    TIME_OUT = "time-out"


@dataclass(frozen=True)
class TierMove:
    """From step ``at`` on the storage of ``buffer`` lies in tier ``to`` at ``offset``."""

    buffer: str
    at: int
    to: str
    offset: int


@dataclass(frozen=True)
class MemoryPlan:
    """Where every buffer lies, and what was proved about it.

    ``offsets`` holds every buffer, also where nothing fits the capacity: then it is the best
    layout found (see ``status``). ``peak`` and ``lower_bound`` are those of the tier ``"main"``;
    ``tier_peaks`` has all tiers. ``timed_out`` says that more time might have given a lower peak
    or a proof. ``binding`` is the load that no plan can go below. ``seconds`` is wall time spent
    planning, ``compile_seconds`` what compiling the search took besides (0 when it was cached).
    """

    offsets: dict[str, int]
    peak: int
    lower_bound: int
    status: Status
    solver: str
    order: tuple[str, ...] = ()
    moves: tuple[TierMove, ...] = ()
    tier_peaks: dict[str, int] = field(default_factory=dict)
    binding: Load | None = None
    timed_out: bool = False
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    compile_seconds: float = 0.0
    nodes: int = 0

    @property
    def gap(self) -> float:
        """How far the peak may be above the least possible one, as a share of the bound."""
        if self.peak <= self.lower_bound:
            return 0.0
        return (self.peak - self.lower_bound) / self.lower_bound if self.lower_bound else 1.0

    @property
    def fits(self) -> bool:
        """Whether the layout is within the capacity (or there is none)."""
        return self.status in (Status.OPTIMAL, Status.FEASIBLE)

    def to_data(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        binding = self.binding
        return {
            "offsets": dict(self.offsets),
            "peak": self.peak,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "status": self.status.value,
            "solver": self.solver,
            "order": list(self.order),
            "moves": [
                {"buffer": m.buffer, "at": m.at, "to": m.to, "offset": m.offset} for m in self.moves
            ],
            "tier_peaks": dict(self.tier_peaks),
            "binding": binding
            and {
                "bytes": binding.bytes,
                "lower": binding.lower,
                "upper": binding.upper,
                "buffers": list(binding.ids),
            },
            "timed_out": self.timed_out,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "compile_seconds": self.compile_seconds,
            "nodes": self.nodes,
        }
