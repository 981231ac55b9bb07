"""compile(): the one function that walks the road from a module to an artifact with proof."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopt import __version__
from mopt.budget import Budget
from mopt.cache import Cache
from mopt.calibration import Calibration
from mopt.choice import Baseline, Observation
from mopt.cost import cost_model
from mopt.device import find_device
from mopt.errors import BudgetNotMet, UsageError
from mopt.frontend import capture
from mopt.layers import find_layers
from mopt.lowering import Artifact, lower
from mopt.machine import machine_fingerprint
from mopt.pass_base import Pass, PassContext, Progress
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
from mopt.rounds import Attempt, choice_data, close_loop, nearest_point

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
    recipe: str | Recipe | None = None,
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[..., Any] | None = None,
    budget: Iterable[str] | str | Budget | None = None,
    dynamic_shapes: Any = None,
    seed: int = 0,
    name: str | None = None,
    require_coverage: float = 0.0,
    allow_slower: bool = False,
    max_minutes: float | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    callbacks: Iterable[Callable[[Step], None]] = (),
) -> Artifact:
    """Capture, compress, lower, check and measure a model; the result carries its report.

    ``example_inputs`` is a tuple of inputs or a mapping of keyword inputs; ``calibration`` any
    iterable of such inputs; ``evaluate(run)`` returns the quality of a callable with the model's
    inputs (see ``mopt.quality.evaluate_metric``). The model itself is left unchanged. ``recipe`` is
    "auto" where a budget is given and "int8-dynamic" where none is; ``allow_slower`` lets "auto"
    give a result that is slower than the uncompressed model.

    Raises a MoptError: UsageError and InputError for what was given, CaptureError, PassError and
    LoweringError for what could not be done, BudgetNotMet (with the artifact) when the measured
    result is outside ``budget``.

        artifact = mopt.compile(model, (x,), recipe="int8-dynamic")
        artifact.save("out")
    """
    started = time.monotonic()
    settings = settings or Settings()
    progress = progress or Progress()
    wanted = Budget.parse(budget)
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe or wanted.default_recipe)
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
    if any(one.chooses for one in passes):
        context = replace(
            context, backend=backend, budget=wanted, allow_slower=allow_slower, cache=Cache(),
            cost_model=cost_model(find_device(target)),
        )  # fmt: skip
    maker = _Maker(
        program, passes, tuple(callbacks), context, chosen, backend, target, settings, evaluate
    )
    baseline_artifact = maker.baseline_artifact
    story: list[dict[str, Any]] = []
    if any(one.chooses for one in passes):
        attempt, story = close_loop(
            maker.compress, maker.attempt, maker.base.copy, wanted, baseline_artifact,
            allow_slower=allow_slower,
        )  # fmt: skip
    else:
        attempt = maker.attempt(maker.compress(()))
    artifact = attempt.artifact
    artifact.report = Report(
        _report_data(
            program, attempt.result, baseline_artifact, artifact, attempt.parity, attempt.quality,
            attempt.timing, chosen, wanted, seed, target,
        )
        | choice_data(attempt, story)
    )  # fmt: skip
    _add_estimates(artifact.report.data, attempt.result.plan.get("choice"))
    _check_budget(wanted, attempt, baseline_artifact)
    return artifact


class _Maker:
    """Makes results of one program: compresses, lowers, checks and measures."""

    def __init__(
        self, program: Program, passes: list[Pass], watchers: tuple[Callable[[Step], None], ...],
        context: PassContext, recipe: Recipe, backend: str, target: str, settings: Settings,
        evaluate: Callable[..., Any] | None,
    ) -> None:  # fmt: skip
        self.program, self.context, self.recipe = program, context, recipe
        self.backend, self.target, self.settings = backend, target, settings
        self.evaluate, self.watchers, self.passes = evaluate, watchers, passes
        context.progress.stage("Compressing")
        self._common = Recipe.load(BASELINE).passes()
        # Most recipes begin with what the baseline runs.
        self._shared = passes[: len(self._common)] == self._common
        self.base = Pipeline(self._common, watchers if self._shared else ()).run(program, context)
        self.baseline_artifact = lower(self.base, backend, target=target)
        check_parity(self.base, self.baseline_artifact, program)

    def compress(self, seen: tuple[Observation, ...]) -> Program:
        """The program after all passes, which are told what came of earlier results."""
        if seen:
            self.context.progress.stage("Choosing again")
        size = self.baseline_artifact.size_bytes
        context = replace(self.context, observations=seen, baseline=Baseline(size))
        if self._shared:
            rest = Pipeline(self.passes[len(self._common) :], self.watchers)
            result = rest.run(self.base, context, reference=self.program)
        else:
            result = Pipeline(self.passes, self.watchers).run(self.program, context)
        changed = sum(step.changed for step in result.steps)
        context.progress.end(f"{len(result.steps)} passes, {changed} changed")
        return result

    def attempt(self, result: Program) -> Attempt:
        """The result lowered, checked against its program, judged and timed."""
        progress, data = self.context.progress, self.context.calibration
        progress.stage("Lowering")
        artifact = lower(result, self.backend, target=self.target)
        artifact.manifest["recipe"] = self.recipe.to_toml(full=True)
        artifact.manifest["seed"] = self.context.seed
        parity = check_parity(result, artifact, self.program)
        store_sample(result, artifact)
        progress.end(f"{self.backend}, checked at {parity.sizes} input sizes")
        progress.stage("Checking", "quality")
        batches = list(islice(data, QUALITY_BATCHES)) if data is not None else []
        quality = measure_quality(self.program, artifact, self.evaluate, batches, progress)
        batch_word = "batch" if quality.batches == 1 else "batches"
        metric_word = f", {quality.result.name}" if quality.result else ""
        progress.end(f"outputs on {quality.batches} {batch_word}{metric_word}")
        return Attempt(result, artifact, parity, quality, self._timing(artifact))

    def _timing(self, artifact: Artifact) -> Timing | None:
        settings, progress = self.settings, self.context.progress
        if not (settings.measure and self.program.coverage.is_whole):
            return None
        progress.stage("Measuring")
        beside = settings.eager_beside and _fits_eager(self.program)
        eager = lower(self.program, "eager") if beside else None
        timing = measure_speed(
            self.baseline_artifact, artifact, eager, threads=settings.threads,
            seed=self.context.seed, max_seconds=settings.measure_seconds, progress=progress,
        )  # fmt: skip
        progress.end(f"{timing.comparison.pairs} alternated pairs of fresh processes")
        return timing


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


def _add_estimates(data: dict[str, Any], choice: dict[str, Any] | None) -> None:
    """What the chooser expected, beside what was measured."""
    if choice is None:
        return
    data["baseline"]["latency_ms"]["estimated"] = choice["baseline"]["latency"]
    data["result"]["latency_ms"]["estimated"] = choice["estimated"]["latency"]
    for row in data["layers"]:
        row.update(choice["layers"].get(row["path"], {}))


def _check_budget(budget: Budget, attempt: Attempt, baseline: Artifact) -> None:
    missed = attempt.missed(budget, baseline)
    if not missed:
        return
    choice = attempt.result.plan.get("choice", {})
    hint = "loosen it, or take a recipe that compresses more or less"
    if choice:
        binding = ", ".join(choice.get("binding") or ["none of the limits in the estimates"])
        hint = f"binding: {binding}; nearest point found: {nearest_point(attempt, baseline)}"
    raise BudgetNotMet(
        "the budget is not met: " + "; ".join(missed), artifact=attempt.artifact, hint=hint
    )
