"""Time probes on this machine: which ones, in what order, and which results to believe.

Probes are drawn evenly over the range of sizes of each family and timed in several rounds, each in
an order of its own, in child processes. A sentinel is timed between blocks of them; blocks in which
it was slow are discarded and taken again while there is time.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mopt.children import run_child
from mopt.cost import Work
from mopt.cost_models.families import families
from mopt.cost_models.family import Family
from mopt.cost_models.probe_child import LEAST_QUIET
from mopt.cost_models.roofline import Roofline
from mopt.device_calibration import CallOverhead
from mopt.disk import scratch
from mopt.json_files import parse_json

Dims = tuple[int, ...]
_BLOCK = 10
_CHUNK_SECONDS = 20.0
# A block whose sentinel took this much longer than the usual best is not believed.
_DRIFT = 1.12
# But that share of all timings is kept in any case.
_KEPT = 0.4
# What one run of a probe should take: long against the clock, short against a time slice.
_RUN_SECONDS = 8e-4
_PROBE_SECONDS = 0.025
_MOST_COPIES = 32
_WARM_BYTES = 1.5e6
_LEAST_PROBES = 8
_LEAST_US = 0.05
# A family is a curve or a surface: probes for the first, share of the rest for the second.
_PRIMES = (2, 3, 5, 7, 11, 13)
_CHILD_TIMEOUT = 120.0


@dataclass(frozen=True)
class Probe:
    """An operator of certain sizes to be timed ``copies`` times in one model."""

    family: str
    dims: Dims
    copies: int


@dataclass(frozen=True)
class Sample:
    """What one operator takes: microseconds, and the relative spread of its rounds.

    ``is_quiet`` tells whether it was timed without waiting for a processor.
    """

    family: str
    dims: Dims
    microseconds: float
    spread: float
    rounds: int
    is_quiet: bool


@dataclass(frozen=True)
class ProbeRun:
    """All samples of a session, and how quiet the machine was.

    ``disturbed`` is the share of timings discarded, ``quiet`` the share of runs that never waited
    for a processor. ``tap_us`` is what an operator takes that does nearly nothing, ``call`` what a
    call of a session takes besides its operators.
    """

    samples: tuple[Sample, ...]
    disturbed: float
    quiet: float
    tap_us: float
    call: CallOverhead
    seconds: float


def plan_probes(count: int, roofline: Roofline, names: Sequence[str] | None = None) -> list[Probe]:
    """About ``count`` probes, spread over families by their shares."""
    chosen = [f for name, f in families().items() if names is None or name in names]
    total = sum(family.share for family in chosen)
    probes: dict[tuple[str, Dims], Probe] = {}
    for family in chosen:
        wanted = max(_LEAST_PROBES, round(count * family.share / total))
        found = 0
        for index in range(4 * wanted):
            dims = family.draw(_point(family, index, wanted))
            if (family.name, dims) not in probes:
                probes[family.name, dims] = Probe(
                    family.name, dims, plan_copies(family, dims, roofline)
                )
                found += 1
            if found >= wanted:
                break
    return list(probes.values())


def _point(family: Family, index: int, wanted: int) -> tuple[float, ...]:
    """The ``index``-th point of a Halton sequence in the family's box; its ends, for a curve."""
    if len(family.box) == 1:
        low, high = family.box[0]
        place = index / (wanted - 1) if index < wanted else _radical_inverse(index, 2)
        return (low + place * (high - low),)
    return tuple(
        low + _radical_inverse(index + 1, prime) * (high - low)
        for (low, high), prime in zip(family.box, _PRIMES, strict=False)
    )


def _radical_inverse(index: int, base: int) -> float:
    value, scale = 0.0, 1.0
    while index:
        scale /= base
        value += scale * (index % base)
        index //= base
    return value


def plan_copies(family: Family, dims: Dims, roofline: Roofline) -> int:
    amount = family.amount(dims)
    work = Work(
        family.kind, amount.flops, amount.weight_bytes, amount.activation_bytes,
        family.weight_format,
    )  # fmt: skip
    seconds = max(1e-3 * roofline.cost(work).milliseconds, 2e-6)
    copies = min(_RUN_SECONDS / seconds, _MOST_COPIES)
    if not amount.weight_bytes:
        copies = min(copies, max(4, _WARM_BYTES / amount.activation_bytes))
    return max(1, round(copies))


def run_probes(
    probes: Sequence[Probe],
    *,
    seconds: float,
    rounds: int = 3,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ProbeRun:
    """Time ``probes`` for about ``seconds``; each at most ``rounds`` times.

    Raises the errors of ``mopt.children.run_child`` for a child that fails.
    """
    session = _Session(probes, threads, random.Random(seed))
    started = time.monotonic()
    end = started + seconds
    while (left := end - time.monotonic()) > 0.5:
        todo = session.next_chunk(rounds)
        if not todo:
            break
        session.time(todo, min(left, _CHUNK_SECONDS))
        if progress is not None:
            progress(session.done(rounds), len(probes) * rounds)
    return session.result(time.monotonic() - started)


@dataclass(frozen=True)
class _Timing:
    """One timing of a probe; ``sentinel`` and ``us`` are microseconds of a run."""

    sentinel: float
    us: float
    copies: int
    taps: int
    runs: int
    quiet: int

    def is_good(self, limit: float) -> bool:
        return self.sentinel <= limit and self.quiet >= LEAST_QUIET


class _Session:
    """All timings so far."""

    def __init__(self, probes: Sequence[Probe], threads: int | None, order: random.Random) -> None:
        # What a run and a tap take is needed for everything else: these come first.
        self._probes = [Probe("tap", (1, 1), 1), Probe("tap", (1, 1), _MOST_COPIES), *probes]
        self._threads = threads
        self._order = order
        self._taken = [0] * len(self._probes)
        self._found: list[list[_Timing]] = [[] for _ in self._probes]
        self._calls: list[CallOverhead] = []

    def next_chunk(self, rounds: int) -> list[int]:
        """Probes to time next: those timed least often first, in random order."""
        limit = self._limit()
        good = [sum(t.is_good(limit) for t in timings) for timings in self._found]
        # A machine that is never quiet must not keep us for ever.
        todo = [
            i for i in range(len(self._probes)) if good[i] < rounds and self._taken[i] < 2 * rounds
        ]
        self._order.shuffle(todo)
        todo.sort(key=lambda i: (i > 1, self._taken[i]))
        return todo

    def time(self, todo: list[int], seconds: float) -> None:
        """One child's worth of timings."""
        job = {
            "threads": self._threads or 0,
            "workers": self._workers(),
            "seconds": seconds,
            "probe_seconds": _PROBE_SECONDS,
            "run_seconds": _RUN_SECONDS,
            "block": _BLOCK,
            "probes": [
                {"at": i, "family": p.family, "dims": p.dims, "copies": p.copies}
                for i, p in ((i, self._probes[i]) for i in todo)
            ],
        }
        with scratch("mopt-probe") as folder:
            path = Path(folder) / "job.json"
            path.write_text(json.dumps(job))
            command = [sys.executable, "-P", "-m", "mopt.cost_models.probe_child", str(path)]
            child = run_child(command, label="timing operators", timeout=_CHILD_TIMEOUT)
        answer = parse_json(child.stdout.strip(), name="the timing process")
        self._calls.append(CallOverhead(**answer["call"]))
        for block in answer["blocks"]:
            sentinel = max(block["before"], block["after"])
            for entry in block["probes"]:
                at = entry.pop("at")
                self._taken[at] += 1
                self._found[at].append(_Timing(sentinel, **entry))

    def _workers(self) -> int:
        return self._threads or len(os.sched_getaffinity(0))

    def done(self, rounds: int) -> int:
        """How many timings there are, of those wanted."""
        return sum(min(taken, rounds) for taken in self._taken[2:])

    def _limit(self) -> float:
        """The slowest sentinel whose block is believed.

        On a machine that is disturbed most of the time, the quietest part has to do.
        """
        seen = sorted(timing.sentinel for timings in self._found for timing in timings)
        if not seen:
            return math.inf
        return max(_DRIFT * seen[len(seen) // 10], seen[int(_KEPT * len(seen))])

    def _call(self, run_us: float) -> CallOverhead:
        """The least of each part, since whatever disturbs makes it larger, and a bare run."""
        if not self._calls:
            return CallOverhead()
        return CallOverhead(
            run_us + min(call.call_us for call in self._calls),
            min(call.input_us for call in self._calls),
            max(call.output_bytes_per_us for call in self._calls),
        )

    def result(self, seconds: float) -> ProbeRun:
        limit = self._limit()
        one, many = (min((t.us for t in self._found[i]), default=5.0) for i in (0, 1))
        tap = max((many - one) / (_MOST_COPIES - 1), 0.05)
        run = max(one - tap, 0.5)
        samples = []
        for i, probe in enumerate(self._probes[2:], 2):
            timings = [t for t in self._found[i] if t.is_good(limit)]
            is_quiet = bool(timings)
            # On a machine that is never quiet, the fastest of all runs has to do.
            timings = timings or sorted(self._found[i], key=lambda t: t.us / t.copies)[:1]
            if not timings:
                continue
            times = [max((t.us - run - t.taps * tap) / t.copies, _LEAST_US) for t in timings]
            middle = statistics.median(times)
            spread = (max(times) - min(times)) / middle / 2 if len(times) > 1 else 0.0
            samples.append(Sample(probe.family, probe.dims, middle, spread, len(times), is_quiet))
        timings = [timing for found in self._found for timing in found]
        slow = sum(not timing.is_good(limit) for timing in timings)
        quiet = sum(t.quiet for t in timings) / max(sum(t.runs for t in timings), 1)
        return ProbeRun(
            tuple(samples), slow / max(len(timings), 1), quiet, tap, self._call(run), seconds
        )  # fmt: skip
