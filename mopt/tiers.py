"""A fast memory of fixed size beside a slow one: what has to move between them, and a plan for it.

A step (an operator) touches values. One that lies in the fast memory is used there; any other is
streamed: read from the slow memory, or written to it, through a window of the fast one while the
step runs. Values that are given lie in the slow memory from the start, values that are kept must
lie there in the end. The bytes of both are compulsory; a plan decides about all others. Solvers
live in ``mopt.passes.schedule``, ``mopt.tier_check`` judges their plans, ``mopt.tier_times`` runs
them against a clock.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from mopt.errors import InputError, quote
from mopt.memory import MAIN, Status, TierMove

SLOW = "slow"


@dataclass(frozen=True)
class TierValue:
    """``bytes`` that steps touch: ``given`` before the first one, ``kept`` after the last."""

    id: str
    bytes: int
    given: bool = False
    kept: bool = False


@dataclass(frozen=True)
class TierStep:
    """An operator: the ids of the values it ``reads``, ``makes`` and ``writes`` to in place.

    ``before`` are steps that must run earlier. ``takes`` are values in whose memory the one value
    it makes may lie if nobody needs them afterwards. Of every group in ``one_of`` at least one
    value must lie in the fast memory while the step runs: a product that streams both its factors
    would read one of them many times. ``workspace`` is in bytes of fast memory, ``seconds`` is the
    time that computing takes.
    """

    id: str
    reads: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    one_of: tuple[tuple[str, ...], ...] = ()
    workspace: int = 0
    seconds: float = 0.0

    @cached_property
    def touches(self) -> tuple[str, ...]:
        """All values it reads, writes or makes, each once."""
        return tuple(dict.fromkeys((*self.reads, *self.writes, *self.makes)))


@dataclass(frozen=True)
class TierProblem:
    """Steps in an order that can run, their values, and a fast memory of ``fast_bytes``.

    ``window_bytes`` is the room that streaming a larger value takes. A value may lie in the fast
    memory in part: in any number of its first pieces, of which it has up to ``most_pieces``.
    ``alignment`` divides every offset and the size of every value. ``writable`` says whether the
    slow memory takes values at all: flash does not while a model runs. Raises InputError:
    ``tier-steps`` (a step or value that is unknown, there twice, made twice or used before it is
    there; a size that is negative or no multiple of the alignment), ``fast-memory-too-small`` (a
    step whose windows, workspace and smallest choice of resident factors exceed it).
    """

    steps: tuple[TierStep, ...]
    values: tuple[TierValue, ...]
    fast_bytes: int
    window_bytes: int = 0
    alignment: int = 1
    most_pieces: int = 1
    writable: bool = True

    def __post_init__(self) -> None:
        if len(self.value) < len(self.values) or len(self.step) < len(self.steps):
            raise InputError("two steps or two values have one name", code="tier-steps")
        for value in self.values:
            if value.bytes < 0 or value.bytes % self.alignment:
                raise InputError(
                    f"value {quote(value.id)} of {value.bytes} bytes is no multiple of the "
                    f"alignment {self.alignment}",
                    code="tier-steps",
                )
        there = {v.id for v in self.values if v.given}
        done: set[str] = set()
        for step in self.steps:
            for name in (*step.reads, *step.writes):
                if name not in there:
                    raise InputError(
                        f"step {quote(step.id)} uses {quote(name)}, which is not there yet",
                        code="tier-steps",
                    )
            if not done.issuperset(step.before):
                raise InputError(
                    f"step {quote(step.id)} stands before a step it must follow", code="tier-steps"
                )
            for name in step.makes:
                if name in there or name not in self.value:
                    raise InputError(
                        f"step {quote(step.id)} makes {quote(name)}, which is "
                        + ("there already" if name in there else "no value of the problem"),
                        code="tier-steps",
                    )
            there.update(step.makes)
            done.add(step.id)
        for step in self.steps:
            self._require_room(step)

    def _require_room(self, step: TierStep) -> None:
        least = self.least_bytes(step)
        if least > self.fast_bytes:
            raise InputError(
                f"step {quote(step.id)} needs {least} bytes of fast memory, there are "
                f"{self.fast_bytes}",
                code="fast-memory-too-small",
                hint="workspace, one factor of its product and a window for each other value",
                site=step.id,
            )

    def least_bytes(self, step: TierStep) -> int:
        """A bound from below on the fast memory that a step needs."""
        streamed = sum(self.window(name) for name in step.touches)
        extra = [
            min(self.value[name].bytes - self.window(name) for name in group)
            for group in step.one_of
        ]
        if not self.writable:
            made = sum(self.value[name].bytes - self.window(name) for name in step.makes)
            extra.append(made if not step.takes else 0)
        return step.workspace + streamed + max(extra, default=0)

    def window(self, name: str) -> int:
        """The room that streaming a value takes: none where it is empty."""
        return min(self.value[name].bytes, self.window_bytes)

    def pieces(self, v: int) -> int:
        """Into how many equal pieces of whole alignment units value number ``v`` may be cut."""
        return self._pieces[v]

    @cached_property
    def _pieces(self) -> tuple[int, ...]:
        units = (v.bytes // self.alignment for v in self.values)
        return tuple(
            max(p for p in range(1, self.most_pieces + 1) if p == 1 or (n and n % p == 0))
            for n in units
        )

    def bytes_beyond(self, v: int, pieces: int) -> int:
        """Bytes of value number ``v`` without its first ``pieces`` pieces."""
        return self.values[v].bytes // self.pieces(v) * (self.pieces(v) - pieces)

    @cached_property
    def value(self) -> dict[str, TierValue]:
        """Values by id."""
        return {v.id: v for v in self.values}

    @cached_property
    def number(self) -> dict[str, int]:
        """Positions of values by id."""
        return {v.id: n for n, v in enumerate(self.values)}

    @cached_property
    def step(self) -> dict[str, TierStep]:
        """Steps by id."""
        return {s.id: s for s in self.steps}

    @cached_property
    def compulsory_bytes(self) -> int:
        """Bytes that move in every plan: given values that are touched, and results."""
        touched = {name for step in self.steps for name in step.touches}
        changed = {name for step in self.steps for name in (*step.makes, *step.writes)}
        reads = sum(v.bytes for v in self.values if v.given and v.id in touched)
        return reads + sum(v.bytes for v in self.values if v.kept and v.id in changed)


@dataclass(frozen=True)
class Stay:
    """``bytes`` of a value from its byte ``first`` on, in the fast memory at ``offset``.

    They are there in steps ``[lower, upper)`` of the order. Those that are ``loaded`` may be read
    from the slow memory from the end of step ``lower - 1`` on and are there before the first step
    in the span that touches the value; any others are made by step ``lower``. A stay may begin in
    the last step of another one, at its offset, where the step may take over that value's memory.
    """

    value: str
    first: int
    bytes: int
    lower: int
    upper: int
    offset: int
    loaded: bool


@dataclass(frozen=True)
class Spill:
    """``bytes`` of a value from its byte ``first`` on, written to ``offset`` of the slow memory.

    The step at position ``at`` of the order changes the value; what of it is not in the fast memory
    is streamed while the step runs, the rest is written after it. The memory belongs to the value
    until ``upper``. A given value is written to where it came from: its offset means nothing.
    """

    value: str
    first: int
    bytes: int
    at: int
    upper: int
    offset: int


@dataclass(frozen=True)
class Window:
    """``bytes`` at ``offset`` through which the step at ``at`` streams what is not in there."""

    value: str
    at: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class TierPlan:
    """An order of the steps, what lies in the fast memory when and where, and what moves.

    ``workspaces`` are offsets by position, where a step needs any. ``moved_bytes`` are all bytes
    between the memories, ``lower_bound`` a proof about them over every order: OPTIMAL says that
    they are equal. ``slow_bytes`` is the room that spilled and kept values take.
    """

    order: tuple[str, ...]
    stays: tuple[Stay, ...]
    spills: tuple[Spill, ...]
    windows: tuple[Window, ...]
    workspaces: dict[int, int]
    moved_bytes: int
    compulsory_bytes: int
    lower_bound: int
    status: Status
    peak: int
    slow_bytes: int = 0
    solver: str = ""
    timed_out: bool = False
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def extra_bytes(self) -> int:
        """Bytes moved beyond the compulsory ones."""
        return self.moved_bytes - self.compulsory_bytes

    @property
    def extra_bound(self) -> int:
        """What no plan goes below of those."""
        return self.lower_bound - self.compulsory_bytes

    def moves(self) -> tuple[TierMove, ...]:
        """Where every value is from when on, as a ``MemoryPlan`` holds it."""
        found = [TierMove(s.value, s.lower, MAIN, s.offset) for s in self.stays]
        found += [TierMove(s.value, s.at + 1, SLOW, s.offset) for s in self.spills]
        return tuple(sorted(found, key=lambda move: (move.at, move.to, move.buffer)))

    def to_data(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return {
            "moved_bytes": self.moved_bytes,
            "compulsory_bytes": self.compulsory_bytes,
            "extra_bytes": self.extra_bytes,
            "extra_bound_bytes": self.extra_bound,
            "status": self.status.value,
            "solver": self.solver,
            "timed_out": self.timed_out,
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak,
            "slow_bytes": self.slow_bytes,
            "order": list(self.order),
            "stays": [asdict(stay) for stay in self.stays],
            "spills": [asdict(spill) for spill in self.spills],
            "windows": [asdict(window) for window in self.windows],
            "workspaces": {str(at): offset for at, offset in self.workspaces.items()},
            "moves": [asdict(move) for move in self.moves()],
            **self.facts,
        }
