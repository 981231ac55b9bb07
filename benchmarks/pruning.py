"""What pruning and low rank give and cost: speed in ONNX Runtime, quality, and a peer.

    python -m benchmarks.pruning speed --models resnet50 --batches 1,8 --output results.json
    python -m benchmarks.pruning language          # heads and neurons, with and without training
    python -m benchmarks.pruning low-rank          # whitened against plain SVD
    python -m benchmarks.pruning sparse            # SparseGPT against magnitude
    python -m benchmarks.pruning recipe --models pydoc-gpt --recipe lqer   # size, quality, speed
    python -m benchmarks.pruning peer --peer-path FOLDER_WITH_TORCH_PRUNING

Speeds are medians of calls that alternate between the dense and the pruned model in one process,
on one thread, both lowered by mopt to ONNX. `peer` compares with Torch-Pruning, installed into a
folder of its own (`pip install --no-deps --target FOLDER torch-pruning`). Results of several runs
are merged into one file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mopt.calibration import Calibration
from mopt.coupling import find_coupling
from mopt.frontend import capture
from mopt.inputs import resized
from mopt.lowering import lower
from mopt.machine import machine_fingerprint
from mopt.models import load
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.recipe import Recipe
from mopt.registry import make_pass

Steps = list[tuple[str, dict[str, Any]]]
# The shares: of FLOPs for convolutional models, of heads and neurons for transformers.
CNNS = ("digits-cnn", "resnet50", "mobilenet-v2", "unet2d", "unet3d")


def base_program(name: str) -> tuple[Any, Program]:
    """A model of the zoo after the passes of the recipe `none`."""
    zoo = load(name)
    shapes = zoo.dynamic_shapes() if zoo.dynamic_shapes else None
    program = capture(zoo.build(), zoo.example_inputs(), shapes)
    return zoo, Pipeline(Recipe.load("none").passes()).run(program)


def compress(program: Program, steps: Steps, calibration: Calibration | None) -> Program:
    """The program after passes."""
    passes = [make_pass(name, options) for name, options in steps]
    return Pipeline(passes).run(program, PassContext(calibration=calibration))


def timed_ratio(dense: Program, pruned: Program, batch: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of both, and the median ratio of alternating calls."""
    here = dense.args[0].shape[0] == batch
    found = (dense.args, dense.kwargs) if here else resized(dense, batch)
    assert found is not None, "the model takes one batch size only"
    args, kwargs = found
    runners = []
    for program in (dense, pruned):
        artifact = lower(program, "onnx")
        runners.append(artifact.load(threads=1))
    times: list[list[float]] = [[], []]
    for runner in runners:
        runner(*args, **kwargs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for at, runner in enumerate(runners):
            started = time.perf_counter()
            runner(*args, **kwargs)
            times[at].append(1e3 * (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return {
        "batch": batch,
        "dense_ms": statistics.median(times[0]),
        "pruned_ms": statistics.median(times[1]),
        "times_faster": statistics.median(ratios),
        "pairs": len(ratios),
    }


def speed(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Half of the FLOPs of a CNN, a quarter of the heads and neurons of a transformer."""
    rows = []
    for name in given.models.split(","):
        _, program = base_program(name)
        options: dict[str, Any] = {"importance": "magnitude"}
        if name in CNNS:
            options |= {"ratio": given.ratio or 0.5}
        else:
            options |= {"ratio": given.ratio or 0.25, "aim": "channels"}
        if given.aim:
            options["aim"] = given.aim
        started = time.perf_counter()
        pruned = compress(program, [("prune-channels", options)], None)
        seconds = time.perf_counter() - started
        step = pruned.steps[-1]
        row: dict[str, Any] = {
            "model": name,
            "options": options,
            "accepted": step.changed,
            "seconds": seconds,
            "removed_flops": step.stats.get("removed_flops", 0.0),
            "removed_parameters": step.stats.get("removed_parameters", 0.0),
        }
        if step.changed:
            estimate = step.stats["estimated_layer_ms"]
            row["estimated_times_faster"] = estimate["before"] / estimate["after"]
            row["measured"] = [
                timed_ratio(program, pruned, int(batch), given.seconds)
                for batch in given.batches.split(",")
            ]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def quality(name: str, methods: dict[str, Steps]) -> list[dict[str, Any]]:
    """The model's metric after each list of passes, and what it took."""
    zoo, program = base_program(name)
    calibration = Calibration(list(zoo.calibration()), program)
    before = zoo.evaluate(program.run)
    rows = [{"model": name, "method": "dense", before["metric"]: before["value"]}]
    print(json.dumps(rows[-1]), flush=True)
    for method, steps in methods.items():
        started = time.perf_counter()
        result = compress(program, steps, calibration)
        seconds = time.perf_counter() - started
        after = zoo.evaluate(result.run)
        row = {
            "model": name,
            "method": method,
            after["metric"]: after["value"],
            "relative_change": after["value"] / before["value"] - 1,
            "parameters_removed": 1 - result.parameter_count() / program.parameter_count(),
            "flops_removed": 1 - result.flops() / program.flops(),
            "seconds": seconds,
            "training_steps": result.steps[-1].stats.get("steps"),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def language(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A quarter of the neurons and of the heads of the trained language model."""
    quarter = {"ratio": 0.25, "aim": "channels", "multiple": 8}
    prune = ("prune-channels", quarter)
    train = ("recover-quality", {"minutes": given.minutes, "steps": given.steps})
    methods: dict[str, Steps] = {
        "magnitude, as it is": [
            ("prune-channels", {**quarter, "importance": "magnitude", "refit": False})
        ],
        "reconstruction, refitted": [prune],
        "reconstruction, refitted, trained": [prune, train],
    }
    chosen = list(methods.items())[-given.last :]
    return quality("pydoc-gpt", dict(chosen))


def digits(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Half of the FLOPs of the trained CNN."""
    half = {"ratio": 0.5}
    return quality("digits-cnn", {
        "magnitude, as it is": [
            ("prune-channels", {**half, "importance": "magnitude", "refit": False})
        ],
        "reconstruction, refitted": [("prune-channels", half)],
    })  # fmt: skip


def low_rank(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A fifth of the parameters of the language model's matrices."""
    plain = {"method": "plain", "ranks": "uniform", "allow_slower": True}
    return quality("pydoc-gpt", {
        "plain, equal shares": [("factorize-linears", plain)],
        "whitened, equal shares": [("factorize-linears", {**plain, "method": "whitened"})],
        "whitened, allocated": [("factorize-linears", {"allow_slower": True, "ratio": 0.22})],
    })  # fmt: skip


def sparse(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Half of the single weights of the language model, free and two of every four."""
    methods: dict[str, Steps] = {}
    for pattern in ("unstructured", "2:4"):
        for name in ("magnitude", "wanda"):
            options = {"importance": name, "pattern": pattern}
            methods[f"{name}, {pattern}"] = [("prune-weights", options)]
        methods[f"SparseGPT, {pattern}"] = [("prune-sparsegpt", {"pattern": pattern})]
    return quality("pydoc-gpt", methods)


def recipe(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Size, quality and speed of what a recipe makes, lowered to ONNX, beside the recipe `none`."""
    rows = []
    for name in given.models.split(","):
        zoo, program = base_program(name)
        calibration = Calibration(list(zoo.calibration())[: given.calibration], program)
        chosen = Recipe.load(given.recipe).with_settings(given.set)
        passes = chosen.passes()[len(Recipe.load("none").passes()) :]
        started = time.perf_counter()
        result = Pipeline(passes).run(program, PassContext(calibration=calibration))
        row: dict[str, Any] = {
            "model": name,
            "recipe": given.recipe,
            "set": given.set,
            "seconds": time.perf_counter() - started,
            "changed": [step.name for step in result.steps if step.changed],
            "parameters_removed": 1 - result.parameter_count() / program.parameter_count(),
            "flops_removed": 1 - result.flops() / program.flops(),
            "kept": [f"{skip.site}: {skip.reason}" for step in result.steps[-len(passes) :]
                     for skip in step.skipped][:5],
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        for side, one in (("before", program), ("after", result)):
            artifact = lower(one, "onnx")
            row[side] = {"bytes": artifact.size_bytes}
            if zoo.evaluate is not None:
                row[side] |= zoo.evaluate(artifact.load(threads=1))
            print(json.dumps(row[side]), flush=True)
        if program.fingerprint() != result.fingerprint():
            row["measured"] = [
                timed_ratio(program, result, int(batch), given.seconds)
                for batch in given.batches.split(",")
            ]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def peer(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Multiply-adds that are left, and the time of the analysis, beside Torch-Pruning."""
    sys.path.insert(0, given.peer_path)
    import torch_pruning

    rows = []
    for name in given.models.split(","):
        zoo = load(name)
        module, inputs = zoo.build(), zoo.example_inputs()
        macs, _ = torch_pruning.utils.count_ops_and_params(module, inputs)
        row: dict[str, Any] = {"model": name}
        row |= _peer_prunes(torch_pruning, module, inputs, macs, given.ratio or 0.25)
        _, program = base_program(name)
        row["mopt_analysis_seconds"] = min(
            _seconds(partial(find_coupling, program)) for _ in range(3)
        )
        options = {"importance": "magnitude", "ratio": given.ratio or 0.25, "aim": "channels",
                   "multiple": 1, "allow_slower": True}  # fmt: skip
        pruned = compress(program, [("prune-channels", options)], None)
        row["mopt_removed_flops"] = 1 - pruned.flops() / program.flops()
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _peer_prunes(
    peer: Any, module: torch.nn.Module, inputs: tuple[Any, ...], macs: float, ratio: float
) -> dict[str, Any]:
    """What Torch-Pruning removes; its own failures are a result."""
    ignored = [m for n, m in module.named_modules() if n == "head"]
    try:
        pruner: Any = None

        def analyse() -> None:
            nonlocal pruner
            pruner = peer.pruner.MagnitudePruner(
                module, inputs, importance=peer.importance.MagnitudeImportance(p=2),
                pruning_ratio=ratio, ignored_layers=ignored,
            )  # fmt: skip

        seconds = _seconds(analyse)
        pruner.step()
        module(*inputs)
        left, _ = peer.utils.count_ops_and_params(module, inputs)
    except Exception as error:  # whatever it fails with is what is reported
        return {"peer_fails": f"{type(error).__name__}: {error}"[:200]}
    return {"peer_analysis_seconds": seconds, "peer_removed_macs": 1 - left / macs}


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


PARTS = {"speed": speed, "language": language, "digits": digits, "low-rank": low_rank,
         "sparse": sparse, "recipe": recipe, "peer": peer}  # fmt: skip


def main() -> None:
    """Run one part and merge its rows into the output file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--models", default="resnet50")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--aim", choices=("flops", "parameters", "channels"))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--last", type=int, default=3, help="only so many methods, from the end")
    parser.add_argument("--recipe", default="prune-channels")
    parser.add_argument("--set", action="append", default=[], help="PASS.OPTION=VALUE")
    parser.add_argument("--calibration", type=int, default=16, help="batches, most")
    parser.add_argument("--peer-path", default="")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = PARTS[given.part](given)
    if given.output is not None:
        known = json.loads(given.output.read_text()) if given.output.is_file() else {}
        known["machine"] = machine_fingerprint()
        known.setdefault("rows", {}).setdefault(given.part, []).extend(rows)
        known.setdefault("commands", []).append(" ".join(["python -m benchmarks.pruning",
                                                          *sys.argv[1:]]))  # fmt: skip
        given.output.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
