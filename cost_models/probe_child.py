"""The process that times probes: reads a job, prints what it found as JSON. Imports no torch.

    python -m mopt.cost_models.probe_child JOB.json

One session is alive at a time, because the threads of a second one would spin beside it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime as ort

from mopt.bench_loop import die_with_parent
from mopt.cost_models.probe_models import PIECES, ProbeModel, build_probe
from mopt.cost_models.runtime import session_options
from mopt.json_files import read_json

# Its time tells whether the machine is as fast as it was: a product that fits a core's cache.
SENTINEL = ("linear.fp32", (32, 256, 256), 16)
_WARMUP_RUNS = 2
_WARMUP_SECONDS = 0.002
_LEAST_RUNS = 5
# So many runs must have been left alone for their median to count.
LEAST_QUIET = 3
_MOST_RUNS = 300
_CALL_VALUES = 1 << 19


def main(job_path: str) -> int:
    """Time every probe of a job, with the sentinel before each block and after the last."""
    die_with_parent()
    job = read_json(job_path)
    end = time.monotonic() + job["seconds"]
    blocks: list[dict[str, Any]] = []
    probes = job["probes"]
    size = job["block"]
    sentinel = _time_one(*SENTINEL, job)
    for start in range(0, len(probes), size):
        found = []
        for probe in probes[start : start + size]:
            if time.monotonic() > end:
                break
            timed = _time_one(probe["family"], tuple(probe["dims"]), probe["copies"], job)
            found.append({"at": probe["at"], **timed})
        before, sentinel = sentinel, _time_one(*SENTINEL, job)
        blocks.append({"before": before["us"], "after": sentinel["us"], "probes": found})
        if time.monotonic() > end:
            break
    print(json.dumps({"blocks": blocks, "call": _time_calls(job)}))
    return 0


def _time_one(
    family: str, dims: tuple[int, ...], copies: int, job: dict[str, Any]
) -> dict[str, Any]:
    """Microseconds of one run, and what it consisted of.

    Keys: ``us``, ``copies``, ``taps``, ``runs``, and ``quiet``, the number of undisturbed ones.
    """
    while True:
        session, binding, taps = _load(family, dims, copies, job)
        taken = _warm_up(session, binding)
        if family.startswith(PIECES):
            break
        # The plan knows this machine from data sheets only, and a long run is a disturbed one.
        fitting = int(copies * job["run_seconds"] / taken)
        if copies == 1 or fitting > copies // 4:
            break
        copies = max(1, fitting)
    gc.disable()
    try:
        times, disturbed = _time_runs(session, binding, job["probe_seconds"])
    finally:
        gc.enable()
    quiet = sorted(t for t, bad in zip(times, disturbed, strict=True) if not bad)
    if len(quiet) >= LEAST_QUIET:
        # A thread that got no processor at all has not waited yet, as the kernel counts, and the
        # others did its work: of several threads' runs only the faster ones had them all.
        typical = quiet[len(quiet) // (2 if job["workers"] == 1 else 4)]
    else:
        # Nothing was left alone: the fastest runs come nearest to what a quiet machine takes.
        typical = sorted(times)[len(times) // 8]
    return {
        "us": typical / 1e3, "copies": copies, "taps": taps, "runs": len(times),
        "quiet": len(quiet),
    }  # fmt: skip


def _load(
    family: str, dims: tuple[int, ...], copies: int, job: dict[str, Any]
) -> tuple[Any, Any, int]:
    model, inputs, taps = build_probe(family, dims, copies)
    session = ort.InferenceSession(
        model, session_options(job["threads"]), providers=["CPUExecutionProvider"]
    )
    return session, _bind(session, inputs), taps


def _bind(session: Any, inputs: dict[str, Any]) -> Any:
    """Inputs given once, so that a run takes no time for them."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return binding


def _warm_up(session: Any, binding: Any) -> float:
    """Seconds of the fastest run among the first."""
    taken: list[float] = []
    while len(taken) < _WARMUP_RUNS or sum(taken) < _WARMUP_SECONDS:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _time_runs(session: Any, binding: Any, seconds: float) -> tuple[list[int], list[bool]]:
    """Nanoseconds of runs, and whether each had to wait for a processor."""
    clock = time.perf_counter_ns
    waits = [os.open(f"/proc/self/task/{task}/schedstat", os.O_RDONLY) for task in _tasks()]
    times: list[int] = []
    disturbed: list[bool] = []
    end = clock() + int(seconds * 1e9)
    try:
        while (len(times) < _LEAST_RUNS or clock() < end) and len(times) < _MOST_RUNS:
            waited, begin = _waited(waits), clock()
            session.run_with_iobinding(binding)
            times.append(clock() - begin)
            disturbed.append(_waited(waits) > waited)
    finally:
        for fd in waits:
            os.close(fd)
    return times, disturbed


def _time_calls(job: dict[str, Any]) -> dict[str, float]:
    """What a call takes besides its operators: in all, per input, and to copy its outputs."""
    one, nine = _time_call(1, 1, job), _time_call(9, 1, job)
    copying = _time_call(1, _CALL_VALUES, job) - one
    per_input = max((nine - one) / 8, 0.0)
    return {
        "call_us": max(one - per_input, 0.0),
        "input_us": per_input,
        "output_bytes_per_us": 4 * _CALL_VALUES / max(copying, 1.0),
    }


def _time_call(inputs: int, values: int, job: dict[str, Any]) -> float:
    """Microseconds that a call through the backend's runner takes more than a bare run."""
    runner_type = import_module("mopt.backends.onnx.runner").OnnxRunner
    model = ProbeModel(1)
    names = [model.give(values if i == 0 else 1) for i in range(inputs)]
    for name in names[1:]:
        model.tap(name, 1)
    if inputs > 1:
        built = model.finish()
    else:
        built = model.finish(model.add("Relu", names[0]))
    session = ort.InferenceSession(
        built, session_options(job["threads"]), providers=["CPUExecutionProvider"]
    )
    runner = runner_type(session, "probe", [])
    arrays = [model.inputs[name] for name in names]
    binding = _bind(session, model.inputs)
    called = _least(lambda: runner.run(arrays))
    return called - _least(lambda: session.run_with_iobinding(binding))


def _least(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(60):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    # Not the very least: a call that found everything in cache is not a usual one.
    return sorted(times)[len(times) // 5] / 1e3


def _tasks() -> list[str]:
    if not Path("/proc/self/schedstat").exists():
        return []
    return [path.name for path in Path("/proc/self/task").iterdir()]


def _waited(files: list[int]) -> int:
    """Nanoseconds that the threads of this process waited for a processor so far."""
    waited = 0
    for fd in files:
        with suppress(ProcessLookupError):  # a thread of a session before, on its way out
            waited += int(os.pread(fd, 64, 0).split()[1])
    return waited


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
