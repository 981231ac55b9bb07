"""Training steps as recomputation problems: what backward reads, and what may be computed again.

Storages are numbered; a value and all its views are one storage. ``replay`` is the judge of every
plan: it runs the plan's order and adds up what is alive. Solvers live in
``mopt.passes.checkpoint``; figures shown to users come from ``replay``, never from a solver.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from mopt.errors import InputError, InternalError
from mopt.quantity import read_bytes

# The form of a value that is moved out of the memory that the budget is about.
OFFLOAD = "offload"


@dataclass(frozen=True)
class Link:
    """Bytes a second to where values are moved out, and back."""

    write: float
    read: float


@dataclass(frozen=True)
class Again:
    """How a forward call is done a second time: not always what the first time did.

    Dropout, for one, is repeated by its kept mask, and batch norm does not move its averages twice.
    """

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    seconds: float = 0.0
    workspace: int = 0


@dataclass(frozen=True)
class Call:
    """One call: the storages it reads and makes, its time, and bytes it needs only while it runs.

    ``again`` is None for what must not be repeated (random numbers, effects, backward calls).
    ``form`` names the smaller form that a call makes of a value; its ``again`` restores the value.
    """

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    seconds: float = 0.0
    workspace: int = 0
    layer: str = ""
    again: Again | None = None
    form: str = ""


@dataclass(frozen=True)
class RecomputeProblem:
    """A forward and a backward pass in their fixed orders.

    ``sizes`` are the bytes of each storage. ``given`` storages exist all the time (weights, inputs,
    incoming gradients); ``constant`` is what they take together. ``results`` stay until the end
    once they are made (outputs, gradients). ``link`` is what values may be moved out over.
    """

    sizes: tuple[int, ...]
    forward: tuple[Call, ...]
    backward: tuple[Call, ...]
    given: frozenset[int] = frozenset()
    results: frozenset[int] = frozenset()
    constant: int = 0
    link: Link | None = None

    @cached_property
    def maker(self) -> dict[int, int]:
        """The forward call that makes a storage, by storage."""
        return {s: i for i, call in enumerate(self.forward) for s in call.makes}

    @cached_property
    def needed(self) -> tuple[int, ...]:
        """Forward storages that backward reads, in order."""
        read = {s for call in self.backward for s in call.reads}
        return tuple(s for s in sorted(read) if s in self.maker)

    @cached_property
    def ways(self) -> dict[int, tuple[int, ...]]:
        """The forward calls that can make a storage again, by storage."""
        found: dict[int, tuple[int, ...]] = {}
        for index, call in enumerate(self.forward):
            for s in call.again.makes if call.again else ():
                found[s] = (*found.get(s, ()), index)
        return found

    @cached_property
    def remakes(self) -> dict[int, int]:
        """The first forward call that can make a storage again, by storage."""
        return {s: ways[0] for s, ways in self.ways.items()}

    @cached_property
    def keep_all(self) -> frozenset[int]:
        """What a plain training step keeps."""
        return frozenset(self.needed)

    @property
    def seconds(self) -> float:
        """Time of the step when nothing is repeated."""
        return sum(call.seconds for call in (*self.forward, *self.backward))


@dataclass(frozen=True)
class Item:
    """One entry of the backward order: a backward call, or a forward call done again."""

    index: int
    repeat: bool = False


@dataclass(frozen=True)
class Replay:
    """What a plan really costs. ``peak_call`` names the call at which most bytes are alive."""

    peak: int
    forward_peak: int
    backward_peak: int
    saved_bytes: int
    repeated_seconds: float
    peak_call: str
    live: tuple[int, ...] = field(repr=False)


def replay(
    problem: RecomputeProblem,
    saved: Iterable[int],
    items: Sequence[Item],
    settled: Mapping[int, int] | None = None,
) -> Replay:
    """Run the forward pass, keep ``saved``, run ``items``.

    ``settled`` maps a forward call that begins to move a value out to the one after which it is
    out; the value is held until then.

    A repetition replaces what it makes: a kept value that is made again lives to its last use
    before that.

    Raises InternalError (``bad-plan``) for an order that reads what is not there or leaves out a
    backward call.
    """
    kept = set(saved)
    waits: dict[int, tuple[int, ...]] = {}
    for begin, end in (settled or {}).items():
        waits[end] = (*waits.get(end, ()), *problem.forward[begin].reads)
    forward = [
        (c.name, (*c.reads, *waits.get(i, ())), c.makes, c.workspace)
        for i, c in enumerate(problem.forward)
    ]
    again, seconds = [], 0.0
    for item in items:
        if item.repeat:
            call = problem.forward[item.index]
            if call.again is None:
                raise InternalError(f"{call.name} cannot be repeated", code="bad-plan")
            seconds += call.again.seconds
            again.append((call.name, call.again.reads, call.again.makes, call.again.workspace))
        else:
            call = problem.backward[item.index]
            again.append((call.name, call.reads, call.makes, call.workspace))
    if [i.index for i in items if not i.repeat] != list(range(len(problem.backward))):
        raise InternalError("the plan does not run backward in order", code="bad-plan")
    results = problem.results
    stays = {s for s in results if s in problem.maker}
    live: list[int] = []
    held = _run(problem, forward, {}, kept | results, live, keep_to_end=True)
    missing = kept - set(held) - problem.given
    if missing:
        raise InternalError(f"storages {sorted(missing)} are never made", code="bad-plan")
    _run(problem, again, {s: problem.sizes[s] for s in kept | stays if s in held}, results, live,
         keep_to_end=False, fixed=stays)  # fmt: skip
    names = [c[0] for c in (*forward, *again)]
    peak = max(live, default=problem.constant)
    border = len(forward)
    return Replay(
        peak,
        max(live[:border], default=problem.constant),
        max(live[border:], default=problem.constant),
        sum(problem.sizes[s] for s in kept - problem.given),
        seconds,
        names[live.index(peak)] if live else "",
        tuple(live),
    )


_Run = tuple[str, tuple[int, ...], tuple[int, ...], int]


def _run(
    problem: RecomputeProblem,
    calls: Sequence[_Run],
    held: dict[int, int],
    stay: frozenset[int] | set[int],
    live: list[int],
    *,
    keep_to_end: bool,
    fixed: Iterable[int] = (),
) -> dict[int, int]:
    """Append the bytes alive at each call; returns the storages held at the end."""
    sizes, given = problem.sizes, problem.given
    fixed = set(fixed)
    # Results are never replaced: a copy that comes with another repetition dies at once.
    whole = frozenset(fixed)
    last: dict[tuple[int, int], int] = {}
    version = dict.fromkeys(held, 0)
    for place, (_, reads, makes, _) in enumerate(calls):
        for s in reads:
            last[s, version.get(s, 0)] = place
        for s in makes:
            if s not in whole:
                version[s] = version.get(s, 0) + 1
    now = dict.fromkeys(held, 0)
    total = problem.constant + sum(held.values())
    for s in [s for s in held if (s, 0) not in last and s not in fixed]:
        total -= held.pop(s)
    for place, (name, reads, makes, workspace) in enumerate(calls):
        for s in reads:
            if s not in held and s not in given:
                raise InternalError(f"{name} reads storage {s}, which is gone", code="bad-plan")
        spare = 0
        for s in makes:
            if s in whole:
                spare += sizes[s]
                continue
            now[s] = now.get(s, 0) + 1
            if s not in held:
                held[s] = sizes[s]
                total += sizes[s]
        live.append(total + spare + workspace)
        for s in {*reads, *makes}:
            if s in held and last.get((s, now.get(s, 0)), -1) <= place and not (
                s in fixed or s in stay
            ):  # fmt: skip
                total -= held.pop(s)
    return held


class PlanStatus(StrEnum):
    """What is known about a plan: nothing cheaper exists, or how far it may be from that."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"


@dataclass(frozen=True)
class RecomputePlan:
    """What to keep and the order of backward, with the figures of ``replay``.

    ``seconds_bound`` is a proved lower bound on the seconds that any plan in the budget takes more.
    ``settled`` says where values that are moved out have left (see ``replay``), ``stall_seconds``
    how long the step waits for such moves.
    ``plain`` is the replay of the step that keeps everything; ``least_peak`` the least peak found.
    """

    saved: frozenset[int]
    items: tuple[Item, ...]
    figures: Replay
    plain: Replay
    least_peak: int
    peak_bound: int
    budget: int
    seconds_bound: float
    solver: str
    solve_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    settled: Mapping[int, int] = field(default_factory=dict)
    stall_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds that the step takes longer than the plain one: repeated, and waited for."""
        return self.figures.repeated_seconds + self.stall_seconds

    @property
    def status(self) -> PlanStatus:
        """Optimal where the bound is reached."""
        reached = self.seconds <= self.seconds_bound * (1 + 1e-9)
        return PlanStatus.OPTIMAL if reached else PlanStatus.FEASIBLE

    @property
    def gap(self) -> float:
        """Seconds above the bound, as a share of them (0: proved least)."""
        spent = self.seconds
        return max(0.0, spent - self.seconds_bound) / spent if spent else 0.0

    def repeats(self) -> dict[int, int]:
        """How often each forward call is done again."""
        found: dict[int, int] = {}
        for item in self.items:
            if item.repeat:
                found[item.index] = found.get(item.index, 0) + 1
        return found

    def to_data(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return {
            "budget": self.budget,
            "peak": self.figures.peak,
            "forward_peak": self.figures.forward_peak,
            "backward_peak": self.figures.backward_peak,
            "peak_call": self.figures.peak_call,
            "plain_peak": self.plain.peak,
            "least_peak": self.least_peak,
            "peak_bound": self.peak_bound,
            "saved_bytes": self.figures.saved_bytes,
            "plain_saved_bytes": self.plain.saved_bytes,
            "repeated_seconds": self.figures.repeated_seconds,
            "stall_seconds": self.stall_seconds,
            "seconds_bound": self.seconds_bound,
            "gap": self.gap,
            "status": self.status.value,
            "solver": self.solver,
            "solve_seconds": self.solve_seconds,
            "notes": list(self.notes),
        }


def parse_bytes(text: str | int | float, what: str = "memory_budget") -> int | float:
    """Bytes from ``2GiB`` or a whole number; a share of the activations (a float) from ``35%``.

    Raises InputError (``memory-budget``) for anything else.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    if isinstance(text, str):
        share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?%", text.strip())
        amount = float(share[1]) / 100 if share else read_bytes(text)
        if amount:
            return amount
    raise InputError(
        f"{what} is {text!r}",
        code="memory-budget",
        hint="give bytes such as 2GiB or 1500MB, or a share of the activations such as '35%'",
    )
