"""compile(): the one function that walks the road from a module to an artifact with proof."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopt import __version__
from mopt.budget import Budget
from mopt.calibration import Calibration
from mopt.errors import BudgetNotMet, UsageError
from mopt.frontend import capture
from mopt.layers import find_layers
from mopt.lowering import Artifact, lower
from mopt.machine import machine_fingerprint
from mopt.pass_base import PassContext, Progress
from mopt.pipeline import Pipeline, Step
from mopt.program import Program
from mopt.proof import (
    QUALITY_BATCHES,
    Parity,
    Quality,
    Timing,
    check_parity,
    measure_quality,
    measure_speed,
    store_sample,
)
from mopt.recipe import Recipe
from mopt.registry import find_backend
from mopt.report import SCHEMA, Report

BASELINE = "none"


@dataclass(frozen=True)
class Settings:
    """How to measure: ``threads`` None means what the runtime picks."""

    measure: bool = True
    measure_seconds: float = 20.0
    threads: int | None = None
    eager_beside: bool = True


def compile(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    backend: str = "onnx",
    target: str = "host",
    recipe: str | Recipe = "int8-dynamic",
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[..., Any] | None = None,
    budget: Iterable[str] | str | Budget | None = None,
    dynamic_shapes: Any = None,
    seed: int = 0,
    name: str | None = None,
    require_coverage: float = 0.0,
    max_minutes: float | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    callbacks: Iterable[Callable[[Step], None]] = (),
) -> Artifact:
    """Capture, compress, lower, check and measure a model; the result carries its report.

    ``example_inputs`` is a tuple of inputs or a mapping of keyword inputs; ``calibration`` any
    iterable of such inputs; ``evaluate(run)`` returns the quality of a callable with the model's
    inputs (see ``mopt.quality.evaluate_metric``). The model itself is left unchanged.

    Raises a MoptError: UsageError and InputError for what was given, CaptureError, PassError and
    LoweringError for what could not be done, BudgetNotMet (with the artifact) when the measured
    result is outside ``budget``.

        artifact = mopt.compile(model, (x,), recipe="int8-dynamic")
        artifact.save("out")
    """
    started = time.monotonic()
    settings = settings or Settings()
    progress = progress or Progress()
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    wanted = Budget.parse(budget)
    passes = chosen.passes()
    find_backend(backend)
    if target not in TARGETS:
        raise UsageError(
            f"no target is called {target!r}", code="unknown-target", hint=f"known: {TARGETS}"
        )

    progress.stage("Capturing")
    program = capture(model, example_inputs, dynamic_shapes, require_coverage=require_coverage)
    program.name = name or program.name
    progress.end(
        f"{program.name} ({_count(program.parameter_count())} parameters), "
        f"{100 * program.coverage.parameters:.3g} % of parameters, "
        f"{100 * program.coverage.flops:.3g} % of FLOPs"
    )
    data = Calibration(calibration, program) if calibration is not None else None
    context = PassContext(
        calibration=data,
        evaluate=evaluate,
        progress=progress,
        seed=seed,
        deadline=started + 60 * max_minutes if max_minutes else None,
    )
    progress.stage("Compressing")
    common = Recipe.load(BASELINE).passes()
    watchers = tuple(callbacks)
    if passes[: len(common)] == common:  # most recipes begin with what the baseline runs
        base = Pipeline(common, watchers).run(program, context)
        rest = Pipeline(passes[len(common) :], watchers)
        result = rest.run(base, context, reference=program)
    else:
        base = Pipeline(common).run(program, context)
        result = Pipeline(passes, watchers).run(program, context)
    progress.end(
        f"{len(result.steps)} passes, {sum(step.changed for step in result.steps)} changed"
    )

    progress.stage("Lowering")
    baseline_artifact = lower(base, backend, target=target)
    artifact = lower(result, backend, target=target)
    artifact.manifest["recipe"] = chosen.to_toml(full=True)
    artifact.manifest["seed"] = seed
    parity = check_parity(result, artifact, program)
    check_parity(base, baseline_artifact, program)
    store_sample(result, artifact)
    progress.end(f"{backend}, checked at {parity.sizes} input sizes")

    progress.stage("Checking", "quality")
    batches = list(islice(data, QUALITY_BATCHES)) if data is not None else []
    quality = measure_quality(program, artifact, evaluate, batches, progress)
    batch_word = "batch" if quality.batches == 1 else "batches"
    metric_word = f", {quality.result.name}" if quality.result else ""
    progress.end(f"outputs on {quality.batches} {batch_word}{metric_word}")
    timing = None
    if settings.measure and program.coverage.is_whole:
        progress.stage("Measuring")
        eager = lower(program, "eager") if settings.eager_beside and _fits_eager(program) else None
        timing = measure_speed(
            baseline_artifact, artifact, eager, threads=settings.threads, seed=seed,
            max_seconds=settings.measure_seconds, progress=progress,
        )  # fmt: skip
        progress.end(f"{timing.comparison.pairs} alternated pairs of fresh processes")
    artifact.report = Report(
        _report_data(
            program, result, baseline_artifact, artifact, parity, quality, timing, chosen, wanted,
            seed, target,
        )
    )  # fmt: skip
    _check_budget(wanted, artifact, quality, timing)
    return artifact


TARGETS = ("host", "cpu")


def _count(number: float) -> str:
    for size, word in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return str(int(number))


def _fits_eager(program: Program) -> bool:
    return not find_backend("eager").unsupported(program)


def _report_data(
    program: Program,
    result: Program,
    baseline: Artifact,
    artifact: Artifact,
    parity: Parity,
    quality: Quality,
    timing: Timing | None,
    recipe: Recipe,
    budget: Budget,
    seed: int,
    target: str,
) -> dict[str, Any]:
    coverage = program.coverage
    return {
        "schema": SCHEMA,
        "mopt": __version__,
        "model": program.name,
        "target": target,
        "backend": artifact.manifest["backend"],
        "recipe": recipe.name,
        "recipe_toml": recipe.to_toml(full=True),
        "seed": seed,
        "budget": budget.texts(),
        "parameters": program.parameter_count(),
        "flops": program.flops(),
        "coverage": {
            "parameters": coverage.parameters,
            "flops": coverage.flops,
            "outside": [
                {"path": part.path, "reason": part.reason, "source": _relative(part.source),
                 "parameters": part.parameters, "flops": part.flops}
                for part in coverage.outside
            ],
        },
        "baseline": _side(baseline, timing, "reference"),
        "result": _side(artifact, timing, "candidate"),
        "speed": _speed(timing),
        "parity": parity.as_json(),
        "quality": quality.as_json(),
        "layers": _layer_rows(program, result),
        "steps": [step.as_json() for step in result.steps],
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": machine_fingerprint(),
        },
    }  # fmt: skip


def _side(artifact: Artifact, timing: Timing | None, side: str) -> dict[str, Any]:
    stats = getattr(timing.comparison, side) if timing else None
    return {
        "size_bytes": artifact.size_bytes,
        "peak_bytes": {"measured": stats.peak_bytes if stats else None, "estimated": None},
        "latency_ms": {"measured": stats.median_ms if stats else None, "estimated": None},
    }


def _speed(timing: Timing | None) -> dict[str, Any] | None:
    if timing is None:
        return None
    found = timing.comparison
    return {
        "ratio": found.ratio,
        "ratio_low": found.low,
        "ratio_high": found.high,
        "confidence": found.confidence,
        "pairs": found.pairs,
        "stopped": found.stopped,
        "is_different": found.is_different,
        "overlapped": found.overlapped,
        "eager_ms": timing.eager.median_ms if timing.eager else None,
        "method": "alternated pairs of fresh processes; medians; exact sign-test interval",
    }


def _layer_rows(program: Program, result: Program) -> list[dict[str, Any]]:
    rows = []
    final = result.parts()
    for path, part in program.parts().items():
        formats = final[path].plan.get("formats", {})
        after = {name: t.numel() * t.element_size() for name, t in final[path].weights().items()}
        for layer in find_layers(part):
            stored = str(layer.weight.target)
            tensor = part.weight(layer.weight)
            rows.append(
                {
                    "path": layer.path,
                    "source": _relative(layer.source),
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "flops": layer.flops,
                    "format": formats.get(layer.path, str(tensor.dtype).removeprefix("torch.")),
                    "bytes_before": tensor.numel() * tensor.element_size(),
                    "bytes_after": sum(
                        size for name, size in after.items()
                        if name == stored or name.startswith(f"{stored}_")
                    ),
                }
            )  # fmt: skip
    return rows


def _relative(source: str) -> str:
    """A source line without the folders above it: reports leave the machine they were made on."""
    if not source:
        return ""
    path = Path(source)
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return path.name


def _check_budget(
    budget: Budget, artifact: Artifact, quality: Quality, timing: Timing | None
) -> None:
    assert artifact.report is not None
    found, before = artifact.report.data["result"], artifact.report.data["baseline"]
    values = {
        "size": (found["size_bytes"], before["size_bytes"]),
        "latency": (found["latency_ms"]["measured"], before["latency_ms"]["measured"]),
        "memory": (found["peak_bytes"]["measured"], before["peak_bytes"]["measured"]),
        "quality": (quality.kept() if quality.kept() is not None else quality.drift.cosine, 1.0),
        "energy": (None, None),
    }
    missed = []
    for constraint in budget.constraints:
        value, base = values[constraint.what]
        if value is None or base is None:
            missed.append(f"{constraint.text} (not measured)")
        elif not constraint.is_met(value, base):
            missed.append(
                f"{constraint.text} (found {value:.6g}, limit {constraint.limit(base):.6g})"
            )
    if missed:
        raise BudgetNotMet(
            "the budget is not met: " + "; ".join(missed),
            artifact=artifact,
            hint="loosen it, or take a recipe that compresses more or less",
        )
