"""What a timing child does: load, warm up, time calls, and say it in one line of JSON.

No torch here: a child that does not need torch starts in a fraction of a second.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mopt.machine import trim_heap

# A parent in a hurry puts here how many seconds the calls of one sample may take.
SECONDS_VARIABLE = "MOPT_SAMPLE_SECONDS"
_PR_SET_PDEATHSIG = 1
# Of the seconds a hurried parent allows; 0.2 : 0.5 like the standard plan.
_WARMUP_SHARE = 2 / 7
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class BenchPlan:
    """How much to call: warm up for both ``warmup_calls`` and ``warmup_seconds``, then time until
    ``calls`` or ``seconds``, at least ``least_calls``. ``limit_seconds`` ends both parts early for
    models too slow for that, each after at least one call."""

    warmup_calls: int = 5
    warmup_seconds: float = 0.2
    calls: int = 40
    seconds: float = 0.5
    least_calls: int = 5
    limit_seconds: float | None = None

    @staticmethod
    def from_environment() -> BenchPlan:
        """The standard plan, with the limit that the parent process asked for, if any."""
        with suppress(KeyError, ValueError):
            return BenchPlan(limit_seconds=float(os.environ[SECONDS_VARIABLE]))
        return BenchPlan()


def anonymous_bytes() -> int:
    """This process's resident private memory that no file backs, exactly, in bytes.

    Mapped model files and libraries do not count, heaps and arenas do. From
    ``/proc/self/smaps_rollup``; the cheaper ``statm`` lags by up to some hundred kB.
    """
    try:
        text = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return _quick_anonymous_bytes(Path("/proc/self/statm").read_bytes())
    return next(int(line.split()[1]) for line in text.splitlines() if "Anonymous:" in line) * 1024


def _quick_anonymous_bytes(statm: bytes) -> int:
    _, resident, shared, *_ = statm.split()
    return (int(resident) - int(shared)) * _PAGE


class PeakMemory:
    """Growth of :func:`anonymous_bytes` since construction: ``peak`` while sampled, and now.

    A thread looks every millisecond while the object is entered; a spike that comes and goes
    between two looks is missed. Enter it only around work that is not being timed.
    """

    def __init__(self) -> None:
        # What the heap has spare would hide the first growth.
        gc.collect()
        trim_heap()
        self.start = anonymous_bytes()
        self.peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def now(self) -> int:
        """Growth at this moment; counts for the peak."""
        grown = max(anonymous_bytes() - self.start, 0)
        self.peak = max(self.peak, grown)
        return grown

    def _watch(self) -> None:
        fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while not self._stop.wait(0.001):
                grown = _quick_anonymous_bytes(os.pread(fd, 200, 0)) - self.start
                self.peak = max(self.peak, grown)
        finally:
            os.close(fd)

    def __enter__(self) -> PeakMemory:
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        self.now()


def run_bench(load: Callable[[], Callable[[], Any]], plan: BenchPlan | None = None) -> str:
    """Time one model in this process; the JSON line that ``mopt.measure`` reads.

    ``load()`` loads the model and gives a function that runs it once on fixed inputs; read the
    inputs before, they are not part of the model's memory. Fields: ``median_ms`` of one call,
    ``calls`` timed, ``load_ms``, ``calling_ms`` (warm-up and timed calls together),
    ``peak_bytes`` (largest growth of private memory while loading and during the warm-up calls,
    against just before loading) and ``steady_bytes`` (growth left after warm-up). Memory is looked
    at before the timed calls only, so it does not disturb them.
    """
    plan = plan or BenchPlan.from_environment()
    die_with_parent()
    clock = time.perf_counter_ns
    memory = PeakMemory()
    with memory:
        start = clock()
        call = load()
        load_ns = clock() - start
        warm_up_ns = _warm_up(call, plan)
    steady = memory.now()
    gc.disable()
    try:
        times = _time_calls(call, plan)
    finally:
        gc.enable()
    return json.dumps(
        {
            "median_ms": statistics.median(times) / 1e6,
            "calls": len(times),
            "load_ms": load_ns / 1e6,
            "calling_ms": (warm_up_ns + sum(times)) / 1e6,
            "peak_bytes": memory.peak,
            "steady_bytes": steady,
        }
    )


def _warm_up(call: Callable[[], Any], plan: BenchPlan) -> int:
    limit = _WARMUP_SHARE * (plan.limit_seconds or float("inf"))
    calls, start = 0, time.perf_counter_ns()
    while True:
        call()
        calls += 1
        spent = time.perf_counter_ns() - start
        is_warm = calls >= plan.warmup_calls and spent >= plan.warmup_seconds * 1e9
        if is_warm or spent >= limit * 1e9:
            return spent


def _time_calls(call: Callable[[], Any], plan: BenchPlan) -> list[int]:
    clock = time.perf_counter_ns
    limit = (1 - _WARMUP_SHARE) * (plan.limit_seconds or float("inf"))
    times: list[int] = []
    spent = 0.0
    while len(times) < plan.calls:
        start = clock()
        call()
        times.append(clock() - start)
        spent += times[-1] / 1e9
        if (len(times) >= plan.least_calls and spent >= plan.seconds) or spent >= limit:
            break
    return times


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    parent = os.getppid()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
