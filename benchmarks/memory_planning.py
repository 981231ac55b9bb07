"""Offsets of buffers: the public MiniMalloc instances, more of their kind, and training traces.

    python benchmarks/memory_planning.py --minimalloc FOLDER [--repeat 5] [--seconds 60]

FOLDER (or the environment variable MOPT_MINIMALLOC) holds files NAME.CAPACITY.csv of the
"challenging" set of google/minimalloc; without it only generated instances run. Each public
instance is solved at its capacity, several times in this process and once by the command line in
a fresh one. Every plan is checked by the checker. Results go to
``benchmarks/results/memory-planning.json`` and as Markdown to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory_instances import as_problem, cut_rectangle, training_trace, with_holes

import mopt
from mopt.machine import machine_fingerprint
from mopt.memory import MemoryPlan, MemoryProblem
from mopt.memory_check import require_legal
from mopt.memory_csv import read_buffers
from mopt.registry import find_placement

# Seconds of the C++ program of the MiniMalloc paper on one core of a machine like this one.
PUBLISHED = {"A": 8.9, "C": 1.5, "E": 7.3, "G": 1.9, "I": 5.6}
COMMAND = "from mopt.cli.main import main; main()"


def main() -> None:
    """Solve, check and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minimalloc", default=os.environ.get("MOPT_MINIMALLOC"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of generated instances")
    parser.add_argument("--largest", type=int, default=5000, help="buffers of the largest one")
    parser.add_argument("--output", default="benchmarks/results/memory-planning.json")
    options = parser.parse_args()
    # The first search on a machine compiles it; that is no property of an instance.
    first = place(as_problem(cut_rectangle(60, 0)), 60.0)
    public = [
        run_public(path, options.repeat) for path in sorted(Path(options.minimalloc).glob("*.csv"))
    ] if options.minimalloc else []  # fmt: skip
    print(public_table(public), flush=True)
    generated = []
    print(generated_header())
    for name, problem in generated_instances(options.largest):
        generated.append(run_generated(name, problem, options.seconds))
        print(generated_row(generated[-1]), flush=True)
    document = {
        "command": "python benchmarks/memory_planning.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_fingerprint(),
        "mopt": mopt.__version__,
        "load_or_compile_seconds": first.compile_seconds,
        "public": public,
        "generated": generated,
    }
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def place(problem: MemoryProblem, seconds: float) -> MemoryPlan:
    """A plan that passed the checker."""
    plan: MemoryPlan = find_placement()(problem, time_limit=seconds)
    require_legal(problem, plan)
    return plan


def run_public(path: Path, repeat: int) -> dict[str, Any]:
    """One instance at the capacity its name states."""
    name, capacity = path.name.split(".")[:2]
    problem = read_buffers(path, int(capacity))
    plans = [place(problem, 30.0) for _ in range(repeat)]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", COMMAND, "plan", str(path), "--capacity", capacity, "-q"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    process = time.perf_counter() - start
    seconds = [plan.seconds for plan in plans]
    return {
        "name": name,
        "buffers": len(problem.buffers),
        "capacity": int(capacity),
        "peak": plans[0].peak,
        "lower_bound": plans[0].lower_bound,
        "status": plans[0].status.value,
        "nodes": plans[0].nodes,
        "seconds": {
            "median": statistics.median(seconds), "low": min(seconds), "high": max(seconds),
        },
        "cpu_seconds": statistics.median(plan.cpu_seconds for plan in plans),
        "process_seconds": process,
        "published_seconds": PUBLISHED.get(name),
    }  # fmt: skip


def generated_instances(largest: int) -> Iterator[tuple[str, MemoryProblem]]:
    """Seeds that were not looked at while the solver was written."""
    for count in (120, 200, 300, 400, 1000, 2000, 5000):
        if count > largest:
            return
        for seed in (101, 102, 103) if count <= 1000 else (101,):
            rows = cut_rectangle(count, seed)
            yield f"cut rectangle {count}, seed {seed}", as_problem(rows)
            yield f"the same with holes, seed {seed}", as_problem(with_holes(rows, seed))
        if count == 400:
            for seed in (101, 102, 103, 104, 105):
                yield f"training trace, seed {seed}", as_problem(training_trace(135, seed))


def run_generated(name: str, problem: MemoryProblem, seconds: float) -> dict[str, Any]:
    """One instance without a capacity: the least peak that is found."""
    plan = place(problem, seconds)
    return {
        "name": name,
        "buffers": len(problem.buffers),
        "peak": plan.peak,
        "lower_bound": plan.lower_bound,
        "gap": plan.gap,
        "status": plan.status.value,
        "solver": plan.solver,
        "seconds": plan.seconds,
        "cpu_seconds": plan.cpu_seconds,
        "nodes": plan.nodes,
    }


def public_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the public instances."""
    lines = [
        "| instance | buffers | capacity | peak | proved bound | seconds, median (low to high) | "
        "CPU seconds | fresh process, s | published C++, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        took = row["seconds"]
        published = row["published_seconds"]
        lines.append(
            f"| {row['name']} | {row['buffers']} | {row['capacity']:,} | {row['peak']:,} | "
            f"{row['lower_bound']:,} | {took['median']:.2f} ({took['low']:.2f} to "
            f"{took['high']:.2f}) | {row['cpu_seconds']:.2f} | {row['process_seconds']:.1f} | "
            f"{published if published is not None else '-'} |"
        )
    return "\n".join(lines) + "\n"


def generated_header() -> str:
    """The first lines of the second table."""
    return (
        "| instance | buffers | gap to the proved bound | seconds | CPU seconds | found by |\n"
        "|---|---|---|---|---|---|"
    )


def generated_row(row: dict[str, Any]) -> str:
    """One line of the second table."""
    gap = "0" if row["gap"] == 0 else f"{row['gap']:.2%}"
    return (
        f"| {row['name']} | {row['buffers']:,} | {gap} | {row['seconds']:.1f} | "
        f"{row['cpu_seconds']:.1f} | {row['solver']} |"
    )


if __name__ == "__main__":
    main()
