"""Memory plans of whole models, against what PyTorch's allocator hands out without them.

    python -m benchmarks.memory_models [--models unet2d,vit] [--write]

For every model of the zoo: the peak of the plain module, the peak by the plan (planned and
replayed), the bound that was proved, the ratios of times to the module and to the same program
without a plan, and the plan for a small device. Results are merged by model. With
``--stream`` the share of weights in memory and the time of a run that reads them from the page
cache. All peaks are PyTorch's allocator's (weights and inputs not counted), in one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopt.allocations import record_allocations
from mopt.frontend import capture
from mopt.lowering import load, lower
from mopt.machine import machine_fingerprint
from mopt.models import load as load_model
from mopt.models import names
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass

RESULTS = Path(__file__).parent / "results"
RECIPES = {"order": ("plan-memory",), "layout": ("use-channels-last", "plan-memory")}


def main() -> None:
    """Measure, print a line a model, and write the results where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(one.name for one in names()))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kind = "streaming" if options.stream else "models"
    for name in options.models.split(","):
        row = _measure(name, options.rounds, options.stream)
        print(json.dumps(row), flush=True)
        if options.write:
            _store(RESULTS / f"memory-{kind}.json", row)


def _store(path: Path, row: dict[str, Any]) -> None:
    """Put a row in the place of the one of the same model."""
    stored = json.loads(path.read_text())["models"] if path.exists() else []
    rows = {one["model"]: one for one in stored} | {row["model"]: row}
    data = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": 1,
        "machine": machine_fingerprint(), "models": [rows[name] for name in sorted(rows)],
    }  # fmt: skip
    path.write_text(json.dumps(data, indent=2) + "\n")


def _measure(name: str, rounds: int, stream: bool) -> dict[str, Any]:
    entry = load_model(name)
    module, inputs = entry.build(), entry.example_inputs()
    program = capture(module, inputs, None)
    if stream:
        return {"model": name, **_streamed(program, rounds)}
    with torch.no_grad():
        module(*inputs)
        with record_allocations() as log:
            kept = module(*inputs)
    row: dict[str, Any] = {"model": name, "eager_bytes": log.total.peak,
                           "outputs_bytes": log.total.kept}  # fmt: skip
    del kept
    row["plans"] = {recipe: _planned(module, program, steps, rounds, log.total.peak)
                    for recipe, steps in RECIPES.items()}  # fmt: skip
    device = make_pass("plan-memory", {"for_device": True})
    plan = Pipeline([device]).run(program).plan["memory"]
    row["device"] = {key: plan[key] for key in (
        "peak_bytes", "lower_bound_bytes", "input_order_bytes", "gap", "seconds")}  # fmt: skip
    return row


def _planned(
    module: nn.Module, program: Program, steps: tuple[str, ...], rounds: int, eager_bytes: int
) -> dict[str, Any]:
    context = PassContext(backend="eager")
    result = Pipeline([make_pass(step, {}) for step in steps]).run(program, context)
    artifact = lower(result, "eager")
    plan = json.loads((artifact.folder / "plan.json").read_text())
    args = program.args
    with artifact.load() as planned, lower(program, "eager").load() as plain, torch.no_grad():
        ratios = _ratios(lambda: planned(*args), lambda: plain(*args), rounds)
        eager = _ratios(lambda: planned(*args), lambda: module(*args), rounds)
    ratios |= {f"eager_{key}": value for key, value in eager.items()}
    return {
        **{key: plan[key] for key in ("peak_bytes", "measured_bytes", "arena_bytes",
                                      "lower_bound_bytes", "gap", "seconds")},
        "saved": round(1 - plan["measured_bytes"] / eager_bytes, 4),
        **ratios,
    }  # fmt: skip


def _streamed(program: Program, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        lower(program, "eager").save(Path(place) / "out")
        args = program.args
        with load(Path(place) / "out") as resident, load(Path(place) / "out", resident=0.4) as run:
            same = all(
                torch.equal(a, b) for a, b in zip(
                    _tensors(resident(*args)), _tensors(run(*args)), strict=True)
            )  # fmt: skip
            ratios = _ratios(lambda: run(*args), lambda: resident(*args), rounds)
    return {"resident": 0.4, "weights_bytes": program.size_bytes(), "same_bits": same, **ratios}


def _tensors(value: Any) -> list[torch.Tensor]:
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _ratios(new: Callable[[], Any], old: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Medians of the ratios of alternated runs: wall time, and processor time of the process,
    which other work on the machine disturbs less."""
    wall, cpu = [], []
    for number in range(rounds + 1):
        taken = []
        for run in (new, old):
            start, used = time.perf_counter(), time.process_time()
            run()
            taken.append((time.perf_counter() - start, time.process_time() - used))
        if number:  # the first round warms up
            wall.append(taken[0][0] / taken[1][0])
            cpu.append(taken[0][1] / taken[1][1])
    return {"time_ratio": round(statistics.median(wall), 3),
            "cpu_ratio": round(statistics.median(cpu), 3)}  # fmt: skip


if __name__ == "__main__":
    main()
