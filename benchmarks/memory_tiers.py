"""A fast memory of fixed size beside a slow one: bytes moved by the plan and by a cache.

    python -m benchmarks.memory_tiers [--models resnet50,unet2d] [--write]

For every model and for 25, 50 and 75 % of the bytes that hold everything: what moves beyond the
compulsory bytes by the plan, the proved bound, and what a fast memory managed as a cache moves in
the order as written, which writes dead values back ("lru") or knows them ("lru, dead known").
"plain" plans whole values only. Weights count ("all") or lie in a memory of their own
("activations"). Times are estimated for the assumed link. Plans pass the checker.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mopt.frontend import capture
from mopt.models import load
from mopt.passes.schedule._liveness import liveness_of
from mopt.passes.schedule._tier_cache import least_recently_used
from mopt.passes.schedule._tier_device import ASSUMED
from mopt.passes.schedule._tier_model import tier_problem
from mopt.passes.schedule._tier_prefetch import read_ahead
from mopt.passes.schedule._tier_search import solve_tiers
from mopt.storages import trace_storages
from mopt.tier_check import require_sound
from mopt.tier_times import run_plan

RESULTS = Path(__file__).parent / "results"
SHARES = (0.25, 0.5, 0.75)


def main() -> None:
    """Plan, print a line for each plan, and write the results where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="resnet50,mobilenet-v2,bert,unet2d")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        for row in _planned(name, options.seconds):
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(_table(rows))
    if options.write:
        data = {"command": "python -m benchmarks.memory_tiers", "date": time.strftime("%Y-%m-%d"),
                "torch": torch.__version__, "plans": rows}  # fmt: skip
        (RESULTS / "memory-tiers.json").write_text(json.dumps(data, indent=2) + "\n")


def _planned(name: str, seconds: float) -> Any:
    entry = load(name)
    program = capture(entry.build(), entry.example_inputs(), None)
    live = liveness_of(program, trace_storages(program))
    for weights in (True, False):
        for share in SHARES:
            model = tier_problem(
                live, lambda needs, share=share: int(needs * share),
                window=lambda most: ASSUMED.chunk(most // 64), weights=weights,
            )  # fmt: skip
            problem = model.problem
            started = time.monotonic()
            plan = solve_tiers(problem, time_limit=seconds)
            took = time.monotonic() - started
            require_sound(problem, plan)
            ahead = read_ahead(problem, plan, ASSUMED)
            require_sound(problem, ahead)
            base = problem.compulsory_bytes
            cache = least_recently_used(problem) - base
            times = run_plan(problem, ahead, ASSUMED)
            yield {
                "model": name, "weights": weights, "share": share, "steps": len(problem.steps),
                "fast_bytes": problem.fast_bytes, "compulsory_bytes": base,
                "extra_bytes": plan.extra_bytes, "bound_bytes": plan.extra_bound,
                "status": plan.status.value, "order": plan.solver,
                "plain_bytes": solve_tiers(
                    replace(problem, most_pieces=1), time_limit=seconds).extra_bytes,
                "lru_bytes": cache,
                "lru_dead_known_bytes": least_recently_used(problem, drops_dead=True) - base,
                "saved": round(1 - plan.extra_bytes / cache, 4) if cache else 0.0,
                "seconds": round(took, 2),
                "run_ms": round(1e3 * times.seconds, 2),
                "without_reading_ahead_ms": round(
                    1e3 * run_plan(problem, plan, ASSUMED).seconds, 2),
                "compute_ms": round(1e3 * times.compute_seconds, 2),
            }  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> str:
    mib = 2.0**20
    lines = ["| model | steps | counted | share | plan | bound | plain | lru | lru, dead known | "
             "saved | s |", "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        keys = ("extra_bytes", "bound_bytes", "plain_bytes", "lru_bytes", "lru_dead_known_bytes")
        sizes = " | ".join(f"{r[key] / mib:.2f}" for key in keys)
        counted = "all" if r["weights"] else "activations"
        lines.append(f"| {r['model']} | {r['steps']} | {counted} | {r['share']:.0%} | {sizes} | "
                     f"{r['saved']:.1%} | {r['seconds']:.1f} |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
