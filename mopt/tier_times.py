"""A clock for plans of two memories: steps, reads and writes as events, with bandwidth and latency.

Reads come in the order in which the plan needs them, writes likewise, on one link each or on one
for both. A load starts when its room is free, a step when the values it needs are there and the
room of what it makes has been written back. What a step streams moves while it computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from mopt.errors import UsageError
from mopt.tiers import Spill, Stay, TierPlan, TierProblem

_ENOUGH = 0.9
_SMALLEST_CHUNK = 4096


@dataclass(frozen=True)
class Link:
    """A way between the memories: bytes per second, seconds a request, and how many at a time.

    The rate of reads in chunks of c bytes is that of "LLM in a flash" (2023), section 3:
    min(bandwidth, requests * c / (latency + c / lane)), with ``lane`` bytes per second for one
    request alone (the bandwidth where it is None). ``both_ways`` says that reads and writes do not
    slow each other down. Raises UsageError (``link``) for numbers no link has.
    """

    bandwidth: float
    latency: float = 0.0
    requests: int = 1
    lane: float | None = None
    both_ways: bool = False

    def __post_init__(self) -> None:
        lane = self.bandwidth if self.lane is None else self.lane
        if not (self.bandwidth > 0 and lane > 0 and self.latency >= 0 and self.requests >= 1):
            raise UsageError(
                f"a link of {self.bandwidth} bytes/s, {self.latency} s, {self.requests} requests "
                "at a time is none",
                code="link",
            )

    def rate(self, chunk: int) -> float:
        """Bytes per second of reads in chunks of ``chunk`` bytes."""
        lane = self.bandwidth if self.lane is None else self.lane
        return min(self.bandwidth, self.requests * chunk / (self.latency + chunk / lane))

    def seconds(self, size: int, chunk: int | None = None) -> float:
        """The time ``size`` bytes take, in chunks or as one."""
        if size == 0:
            return 0.0
        return size / self.rate(min(size, chunk) if chunk else size)

    def chunk(self, most: int) -> int:
        """The smallest power of two that reaches nine tenths of the best rate, at most ``most``."""
        size = _SMALLEST_CHUNK
        while size * 2 <= most and self.rate(size) < _ENOUGH * self.rate(most):
            size *= 2
        return min(size, most)


@dataclass(frozen=True)
class Event:
    """Something that ran from ``start`` to ``end`` seconds: a step, load, stream or spill."""

    kind: str
    name: str
    start: float
    end: float
    bytes: int = 0


@dataclass(frozen=True)
class TierTimes:
    """What a run takes. ``stall_seconds`` is time in which no step computed; ``peak_bytes`` is the
    highest byte of the fast memory in use at any moment."""

    seconds: float
    compute_seconds: float
    link_seconds: float
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    events: tuple[Event, ...] = field(repr=False, default=())

    @property
    def stall_seconds(self) -> float:
        """Seconds in which nothing was computed."""
        return self.seconds - self.compute_seconds


def run_plan(problem: TierProblem, plan: TierPlan, link: Link) -> TierTimes:
    """Run a sound plan against the clock."""
    return _Run(problem, plan, link).run()


class _Run:
    """Times are fixed one transfer after the other: each waits only for earlier ones and steps."""

    def __init__(self, problem: TierProblem, plan: TierPlan, link: Link) -> None:
        self.problem, self.plan, self.link = problem, plan, link
        self.free = {"read": 0.0, "write": 0.0}
        self.step_end: list[float] = []
        self.events: list[Event] = []
        self.loads: defaultdict[int, list[tuple[int, Stay]]] = defaultdict(list)
        uses: defaultdict[str, list[int]] = defaultdict(list)
        for at, name in enumerate(plan.order):
            for value in problem.step[name].touches:
                uses[value].append(at)
        for stay in plan.stays:
            if stay.loaded:
                first = next(at for at in uses[stay.value] if at >= stay.lower)
                self.loads[stay.lower].append((first, stay))
        self.loaded: defaultdict[int, float] = defaultdict(float)
        self.spilled: list[tuple[Stay, float]] = []
        self.inside: list[dict[str, int]] = [{} for _ in plan.order]
        for stay in plan.stays:
            for at in range(stay.lower, stay.upper):
                row = self.inside[at]
                row[stay.value] = row.get(stay.value, 0) + stay.bytes
        self.windows = {(w.value, w.at): w for w in plan.windows}

    def run(self) -> TierTimes:
        plan = self.plan
        for at in range(len(plan.order)):
            before = self.step_end[-1] if self.step_end else 0.0
            waiting = sorted(self.loads[at], key=lambda row: row[0])
            for first, stay in waiting:
                if first == at:
                    self._load(stay, first, before)
            self._step(at, max(before, self.loaded[at], self._room(at)))
            for first, stay in waiting:
                if first > at:
                    self._load(stay, first, before)
            self._spill(at)
        end = max([self.free["read"], self.free["write"], *self.step_end[-1:]], default=0.0)
        compute = sum(step.seconds for step in self.problem.steps)
        moved = [e for e in self.events if e.kind != "step"]
        return TierTimes(
            end, compute, sum(e.end - e.start for e in moved),
            sum(e.bytes for e in moved if e.kind in ("load", "read")),
            sum(e.bytes for e in moved if e.kind in ("spill", "write")),
            plan.peak, tuple(sorted(self.events, key=lambda e: (e.start, e.end))),
        )  # fmt: skip

    def _move(self, kind: str, name: str, start: float, size: int, chunk: int | None) -> float:
        """Queue bytes on the link; the time at which they are there."""
        way = "write" if kind in ("spill", "write") and self.link.both_ways else "read"
        begin = max(start, self.free[way])
        end = begin + self.link.seconds(size, chunk)
        self.free[way] = end
        self.events.append(Event(kind, name, begin, end, size))
        return end

    def _load(self, stay: Stay, first: int, start: float) -> None:
        start = max(start, self._wait(stay.offset, stay.offset + stay.bytes))
        end = self._move("load", stay.value, start, stay.bytes, None)
        self.loaded[first] = max(self.loaded[first], end)

    def _room(self, at: int) -> float:
        """When what the step makes and streams may be written over what lay there."""
        rows = [(s.offset, s.bytes) for s in self.plan.stays if s.lower == at and not s.loaded]
        rows += [(w.offset, w.bytes) for w in self.plan.windows if w.at == at]
        return max((self._wait(o, o + size) for o, size in rows), default=0.0)

    def _wait(self, first: int, end: int) -> float:
        return max(
            (t for s, t in self.spilled if s.offset < end and first < s.offset + s.bytes),
            default=0.0,
        )

    def _step(self, at: int, start: float) -> None:
        step = self.problem.step[self.plan.order[at]]
        end = start + step.seconds
        self.events.append(Event("step", step.id, start, end))
        for kind, value, size in self._streamed(at):
            window = self.windows[value, at]
            there = self._move(kind, value, start, size, max(window.bytes // 2, 1))
            end = max(end, there)
        self.step_end.append(end)

    def _streamed(self, at: int) -> Iterator[tuple[str, str, int]]:
        step = self.problem.step[self.plan.order[at]]
        for value in step.touches:
            size = self.problem.value[value].bytes - self.inside[at].get(value, 0)
            if size and value not in step.makes:
                yield "read", value, size
        for value in step.touches:
            size = self.problem.value[value].bytes - self.inside[at].get(value, 0)
            if size and (value in step.makes or value in step.writes):
                yield "write", value, size

    def _spill(self, at: int) -> None:
        """Write what the step changed and the plan wants in the slow memory, too."""
        for spill in self.plan.spills:
            if spill.at != at:
                continue
            stays = [s for s in self.plan.stays if s.value == spill.value and _covers(s, spill)]
            for stay in stays:
                first = max(stay.first, spill.first)
                size = min(stay.first + stay.bytes, spill.first + spill.bytes) - first
                end = self._move("spill", spill.value, self.step_end[at], size, None)
                self.spilled.append((stay, end))


def _covers(stay: Stay, spill: Spill) -> bool:
    """Whether a stay holds some of what a spill writes when it is written."""
    return (
        stay.lower <= spill.at < stay.upper
        and stay.first < spill.first + spill.bytes
        and spill.first < stay.first + stay.bytes
    )
