"""Compare the speed of two models honestly: pairs of fresh processes in random order.

One sample is a fresh process that loads a model, warms up and gives the median of its calls
(``mopt.bench_loop``). A pair is one sample of each side, which side first is drawn at random, and
counts as d = log(candidate / reference), so whatever slows the machine for longer than a pair
cancels. The median of d gets an exact interval without assuming a distribution
(``mopt.sign_test``); ten pairs are taken, then 20, then 40 while undecided.
"""

from __future__ import annotations

import math
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mopt.bench_loop import SECONDS_VARIABLE
from mopt.children import run_child
from mopt.errors import ArtifactError, MoptError, UsageError, quote
from mopt.json_files import parse_json
from mopt.machine import machine_fingerprint
from mopt.pairs import LOOKS, QUICK_LOOK, PairPlan, Stopped, collect_pairs
from mopt.sign_test import TAIL, Verdict, median_interval

SAMPLE_TIMEOUT = 300.0
_LOCK_NAME = "\0mopt-measuring"
_LOCK_WAIT_SECONDS = 120.0
# Seconds a process is taken to need before its first call, until one was seen.
_USUAL_OVERHEAD = 0.5
_DISTURBED_FROM = 2.0


@dataclass(frozen=True)
class Subject:
    """Something to measure: a command that prints one line of JSON, see ``Sample``."""

    command: Sequence[str]
    label: str
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """What one fresh process found.

    ``peak_bytes`` is the largest growth of its private memory (RssAnon: heaps and arenas, so
    weights that were copied or repacked, and activations; not pages of mapped files, which the
    system can drop) over the moment before the model was loaded, during loading and warm-up.
    ``steady_bytes`` is the growth left after warm-up, where the command says it.
    """

    median_ms: float
    calls: int
    load_ms: float
    peak_bytes: int
    steady_bytes: int | None = None


@dataclass(frozen=True)
class Side:
    """All samples of one side: medians of them, and the largest peak."""

    label: str
    samples: tuple[Sample, ...]

    @property
    def median_ms(self) -> float:
        """Median over processes of the median call, in milliseconds."""
        return statistics.median(sample.median_ms for sample in self.samples)

    @property
    def load_ms(self) -> float:
        """Median time to load, in milliseconds."""
        return statistics.median(sample.load_ms for sample in self.samples)

    @property
    def peak_bytes(self) -> int:
        """Largest peak of private memory over the samples."""
        return max(sample.peak_bytes for sample in self.samples)

    @property
    def steady_bytes(self) -> int | None:
        """Largest private memory left after warm-up, where every sample has one."""
        found = [s.steady_bytes for s in self.samples if s.steady_bytes is not None]
        return max(found) if len(found) == len(self.samples) else None

    @property
    def calls(self) -> int:
        """Calls timed in all processes together."""
        return sum(sample.calls for sample in self.samples)

    def as_json(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "label": self.label,
            "median_ms": self.median_ms,
            "load_ms": self.load_ms,
            "peak_bytes": self.peak_bytes,
            "steady_bytes": self.steady_bytes,
            "samples": len(self.samples),
            "calls": self.calls,
        }

    def undisturbed(self) -> Side:
        """Without samples that took more than twice as long as the fastest.

        What else a machine does, up to a halt of minutes, only ever makes a sample slower.
        """
        fastest = min(sample.median_ms for sample in self.samples)
        kept = tuple(s for s in self.samples if s.median_ms <= _DISTURBED_FROM * fastest)
        return Side(self.label, kept)


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare``.

    ``ratio`` = exp(median d) is candidate time over reference time (below 1 is faster) and lies
    between ``low`` and ``high`` with probability ``confidence``: at least 99 % from 8 pairs on,
    less before, 0 for a single pair. ``stopped`` says why no more was measured: ``decided``,
    ``clear`` (quick only), ``pairs`` or ``time``. ``overlapped`` is true if another measurement on
    this machine could not be waited for.
    """

    reference: Side
    candidate: Side
    log_ratios: tuple[float, ...]
    ratio: float
    low: float
    high: float
    confidence: float
    tolerance: float
    verdict: Verdict
    stopped: Stopped
    seconds: float
    seed: int
    overlapped: bool
    machine: dict[str, Any]

    @property
    def pairs(self) -> int:
        """Pairs measured."""
        return len(self.log_ratios)

    @property
    def is_different(self) -> bool:
        """Whether the interval excludes "equally fast" at 99 % or more."""
        return self.confidence >= 1 - 2 * TAIL and not self.low <= 1 <= self.high

    def as_json(self) -> dict[str, Any]:
        """Plain data for a report or a baseline."""
        return {
            "reference": self.reference.as_json(),
            "candidate": self.candidate.as_json(),
            "log_ratios": list(self.log_ratios),
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "pairs": self.pairs,
            "tolerance": self.tolerance,
            "verdict": self.verdict,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "seed": self.seed,
            "overlapped": self.overlapped,
            "machine": self.machine,
        }


def compare(
    reference: Subject,
    candidate: Subject,
    *,
    tolerance: float = 0.1,
    max_pairs: int = LOOKS[-1],
    max_seconds: float | None = None,
    quick: bool = False,
    models: int = 1,
    seed: int = 0,
    sample_timeout: float = SAMPLE_TIMEOUT,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure the two in alternated pairs of fresh processes.

    ``verdict`` is ``fail`` when the candidate is slower than the reference by more than
    ``tolerance`` (0.1 is 10 %), ``pass`` when it is not, ``noisy`` when the machine did not allow
    to say. ``max_seconds`` bounds the whole, waiting for other measurements aside; the first pair
    is always finished. ``models`` is how many a gate compares at once.

    ``quick`` is for reports rather than gates: at most 10 pairs, over at 8 when all agree which
    side is faster, and samples of slow models cut short so that 8 pairs fit into ``max_seconds``
    (each has at least one call of warm-up and one timed call). ``progress(done, planned)`` is
    called ahead of each pair.

    Raises UsageError for impossible arguments, and the errors of ``measure_one`` for a command
    that fails.
    """
    if not 0 <= tolerance < 10 or max_pairs < 1 or models < 1:
        raise UsageError(
            f"tolerance {tolerance!r}, max_pairs {max_pairs!r}, models {models!r}: expected a "
            "tolerance from 0 to 10, at least one pair and one model",
            code="measure-arguments",
        )
    plan = PairPlan(tolerance, max_pairs, max_seconds, quick, models)
    run = _Run((reference, candidate), plan, random.Random(seed), sample_timeout)
    started = time.monotonic()
    found, verdict, stopped = collect_pairs(run.draw, plan, clock=run.clock, progress=progress)
    interval = median_interval(found, plan.tail)
    before, after = (
        Side(subject.label, tuple(samples))
        for subject, samples in zip(run.subjects, run.samples, strict=True)
    )
    return Comparison(
        reference=before,
        candidate=after,
        log_ratios=tuple(found),
        ratio=math.exp(interval.median),
        low=math.exp(interval.low),
        high=math.exp(interval.high),
        confidence=interval.confidence,
        tolerance=tolerance,
        verdict=verdict,
        stopped=stopped,
        seconds=time.monotonic() - started,
        seed=seed,
        overlapped=run.overlapped,
        machine=machine_fingerprint(),
    )


def measure_one(
    subject: Subject, *, samples: int = 3, sample_timeout: float = SAMPLE_TIMEOUT
) -> Side:
    """Measure one model in ``samples`` fresh processes, without anything to compare with.

    Raises ArtifactError (``child-crashed``, ``child-failed``, ``sample-format``) or LimitError
    (``child-timeout``, ``child-output``) for a command that fails.
    """
    found = []
    for _ in range(samples):
        with _alone():
            found.append(_take_sample(subject, sample_timeout)[0])
    return Side(subject.label, tuple(found))


class _Run:
    """One comparison under way: draws pairs and keeps their samples."""

    def __init__(
        self,
        subjects: tuple[Subject, Subject],
        plan: PairPlan,
        order: random.Random,
        sample_timeout: float,
    ) -> None:
        self.subjects = subjects
        self.samples: tuple[list[Sample], list[Sample]] = ([], [])
        self.overlapped = False
        self._plan = plan
        self._order = order
        self._sample_timeout = sample_timeout
        self._waited = 0.0
        self._overhead = _USUAL_OVERHEAD
        self._started = self.clock()

    def clock(self) -> float:
        """Seconds, those spent waiting for other measurements left out."""
        return time.monotonic() - self._waited

    def draw(self) -> float:
        """One sample of each side in random order; the log of the ratio of their medians."""
        with _alone() as (wait, is_alone):
            self._waited += wait
            self.overlapped = self.overlapped or not is_alone
            cut = self._cut_seconds()
            overheads = []
            for side in self._order.sample((0, 1), 2):
                sample, overhead = _take_sample(self.subjects[side], self._sample_timeout, cut)
                self.samples[side].append(sample)
                overheads.append(overhead)
            self._overhead = max(overheads)
        return math.log(self.samples[1][-1].median_ms / self.samples[0][-1].median_ms)

    def _cut_seconds(self) -> float | None:
        """How long the calls of a sample may take so that enough pairs fit."""
        if not self._plan.quick or self._plan.max_seconds is None:
            return None
        missing = max(min(QUICK_LOOK, self._plan.max_pairs) - len(self.samples[0]), 1)
        left = self._plan.max_seconds - (self.clock() - self._started)
        return max(left / (2 * missing) - self._overhead, 0.01)


def _take_sample(
    subject: Subject, timeout: float, cut_seconds: float | None = None
) -> tuple[Sample, float]:
    """A sample, and the seconds its process spent on other things than calling the model."""
    label = f"timing {quote(subject.label)}"
    env = dict(subject.env)
    if cut_seconds is not None:
        env[SECONDS_VARIABLE] = f"{cut_seconds:.6g}"
    result = run_child(subject.command, label=label, timeout=timeout, env=env)
    lines = result.stdout.strip().splitlines()
    printed = lines[-1] if lines else b""
    try:
        fields = parse_json(printed, name=label)
        sample = Sample(
            median_ms=float(fields["median_ms"]),
            calls=int(fields["calls"]),
            load_ms=float(fields["load_ms"]),
            peak_bytes=int(fields["peak_bytes"]),
            steady_bytes=int(fields["steady_bytes"]) if "steady_bytes" in fields else None,
        )
        calling_ms = float(fields.get("calling_ms", sample.calls * sample.median_ms))
    except (MoptError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise ArtifactError(
            f"{label}: expected one line of JSON with median_ms, calls, load_ms and peak_bytes, "
            f"found {quote(printed.decode('utf-8', 'backslashreplace'))}",
            code="sample-format",
        ) from e
    if sample.median_ms <= 0 or sample.calls < 1 or sample.peak_bytes < 0:
        raise ArtifactError(f"{label}: impossible values {sample}", code="sample-format")
    return sample, max(result.seconds - calling_ms / 1e3, 0.0)


@contextmanager
def _alone() -> Iterator[tuple[float, bool]]:
    """Hold the machine's one place for measuring; gives the seconds waited, and whether it came.

    The place is a name of an abstract socket: the kernel frees it when its holder dies.
    """
    started = time.monotonic()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as place:
        while True:
            waited = time.monotonic() - started
            try:
                place.bind(_LOCK_NAME)
            except OSError:
                if waited < _LOCK_WAIT_SECONDS:
                    time.sleep(0.02)
                    continue
                yield waited, False
                return
            yield waited, True
            return
