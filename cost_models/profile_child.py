"""The process that times the operators of a whole model: reads a job, prints JSON.

    python -m mopt.cost_models.profile_child JOB.json

The runtime's own profiler is on, which slows small operators a little: times are for comparing
layers of two models, not for sums. Imports no torch.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mopt.bench_loop import die_with_parent
from mopt.cost_models.runtime import session_options
from mopt.disk import scratch
from mopt.json_files import read_json
from mopt.npz_files import read_npz

_WARMUP_RUNS = 3
_LEAST_RUNS, _MOST_RUNS = 6, 60
# Whatever disturbs a run makes it longer, so the usual undisturbed time is below the median.
_QUANTILE = 0.25


def main(job_path: str) -> int:
    """Run the model of a job for a while; print its operators in order, each with its ms."""
    die_with_parent()
    job = read_json(job_path)
    with scratch("mopt-profile") as folder:
        options = session_options(job["threads"])
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
        inputs = read_npz(Path(job["inputs"]))
        runs, end = 0, time.monotonic() + job["seconds"]
        while runs < _WARMUP_RUNS + _LEAST_RUNS or (time.monotonic() < end and runs < _MOST_RUNS):
            session.run(None, inputs)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_bytes())
    print(json.dumps(_usual(events, runs)))
    return 0


def _usual(events: list[dict[str, Any]], runs: int) -> list[list[Any]]:
    """Names and ms of the operators of one run; [] where runs differ from each other."""
    timed = [event for event in events
             if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]  # fmt: skip
    count = len(timed) // runs
    names = [event["name"].removesuffix("_kernel_time") for event in timed]
    if count * runs != len(timed) or names != names[:count] * runs:
        return []
    table = np.array([event["dur"] for event in timed], float).reshape(runs, count)
    usual = np.quantile(table[_WARMUP_RUNS:], _QUANTILE, axis=0) / 1e3
    return [[name, float(ms)] for name, ms in zip(names[:count], usual, strict=True)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
