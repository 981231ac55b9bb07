"""compile(): the one function that walks the road from a module to an artifact with proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from mopt.allowance import TIME_IS_UP, Allowance
from mopt.budget import Budget
from mopt.cache import Cache
from mopt.calibration import Calibration
from mopt.choice import Baseline, Observation
from mopt.cost import cost_model
from mopt.device import DeviceProfile, find_device
from mopt.errors import BudgetNotMet, UsageError
from mopt.estimates import Estimator, add_estimates
from mopt.frontend import capture
from mopt.lowering import Artifact, lower
from mopt.measure import Side
from mopt.pass_base import Pass, PassContext, Progress
from mopt.pipeline import Pipeline, Step
from mopt.program import Program
from mopt.proof import (
    QUALITY_BATCHES,
    Quality,
    Timing,
    check_parity,
    measure_quality,
    measure_speed,
    store_sample,
)
from mopt.recipe import Recipe
from mopt.registry import find_backend, list_backends, make_pass
from mopt.report import Report
from mopt.report_data import report_data
from mopt.rounds import Attempt, choice_data, close_loop, nearest_point

BASELINE = "none"
# What exporting and loading a model takes beside it, as a multiple of its weights.
_LOWERED_TIMES = 2.5
_MEASURE_SHARE = 0.5


@dataclass(frozen=True)
class Settings:
    """How to measure: ``threads`` None means what the runtime picks.

    Nothing is measured for a target that is another machine, whatever ``measure`` says. Without
    ``uncompressed_beside`` the uncompressed model is not built: its size is that of its weights.
    """

    measure: bool = True
    measure_seconds: float = 20.0
    threads: int | None = None
    eager_beside: bool = True
    uncompressed_beside: bool = True


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
    max_memory_bytes: int | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    callbacks: Iterable[Callable[[Step], None]] = (),
) -> Artifact:
    """Capture, compress, lower, check and measure a model; the result carries its report.

    ``example_inputs`` is a tuple of inputs or a mapping of keyword inputs; ``calibration`` any
    iterable of such inputs; ``evaluate(run)`` returns the quality of a callable with the model's
    inputs (see ``mopt.quality.evaluate_metric``). The model itself is left unchanged. ``recipe`` is
    "auto" where a budget is given and "int8-dynamic" where none is; ``allow_slower`` lets "auto"
    give a result that is slower than the uncompressed model. ``target`` is a device
    (``mopt devices list``); for one that is not this machine, times are estimates.

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
    passes = _with_memory_plan(chosen.passes(), wanted, backend)
    device = find_target(target, backend)
    settings = replace(settings, measure=settings.measure and device.is_host)

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
        backend=backend,
        deadline=started + 60 * max_minutes if max_minutes else None,
        max_memory_bytes=max_memory_bytes,
    )
    allowance = Allowance(context.deadline, max_memory_bytes)
    chooses = any(one.chooses for one in passes)
    cache = Cache()
    costs = cost_model(
        device, timed=chooses and settings.measure, cache=cache, threads=settings.threads
    )
    # Passes that make a model smaller ask too whether that is faster, on the target and no other.
    context = replace(context, device=device, cost_model=costs, cache=cache, allowance=allowance)
    if chooses:
        context = replace(context, backend=backend, budget=wanted, allow_slower=allow_slower)
    maker = _Maker(
        program, passes, tuple(callbacks), context, chosen, backend, target, settings, evaluate,
        Estimator(device, costs),
    )  # fmt: skip
    baseline_artifact = maker.baseline_artifact
    story: list[dict[str, Any]] = []
    if chooses:
        attempt, story = close_loop(
            maker.compress, maker.attempt, maker.base.copy, wanted, baseline_artifact,
            allow_slower=allow_slower, another=maker.has_time_for_another,
        )  # fmt: skip
    else:
        attempt = maker.attempt(maker.compress(()))
    artifact = attempt.artifact
    data_found = report_data(
        program, attempt.result, baseline_artifact, artifact, attempt.parity, attempt.quality,
        attempt.timing, chosen, wanted, seed, target,
    ) | choice_data(attempt, story)  # fmt: skip
    add_estimates(
        data_found, device, maker.baseline_cost, attempt.cost, attempt.result.size_bytes(),
        attempt.result.plan.get("choice"),
    )  # fmt: skip
    data_found["notes"] = list(allowance.notes)
    artifact.report = Report(data_found)
    if allowance.stopped:
        raise BudgetNotMet(
            allowance.stopped, code=TIME_IS_UP, artifact=artifact,
            hint="what took long is kept: the same command goes on from there, with more time",
        )  # fmt: skip
    _check_budget(wanted, attempt, baseline_artifact)
    return artifact


def find_target(target: str, backend: str) -> DeviceProfile:
    """The device ``target``, for which ``backend`` can lower.

    Raises UsageError ``unknown-device``, ``unknown-backend`` or ``target-backend``, InputError for
    a profile that is not sound.
    """
    device = find_device(target)
    find_backend(backend)
    if not (device.is_host or backend in device.backends):
        able = ", ".join(device.backends)
        usable = [name for name in device.backends if name in list_backends()]
        raise UsageError(
            f"the backend {backend!r} does not lower for {device.id}"
            + (f"; it takes {able}" if able else ", and neither does any other here"),
            code="target-backend",
            hint=f"-b {usable[0]}" if usable
            else f"mopt pareto -t {target} estimates for it without lowering",
        )  # fmt: skip
    return device


def _with_memory_plan(passes: list[Pass], budget: Budget, backend: str) -> list[Pass]:
    """The passes, and a memory plan last where memory is limited and the backend can keep one."""
    planned = any(one.pass_name == "plan-memory" for one in passes)
    if planned or not budget.get("memory") or not hasattr(find_backend(backend), "record_calls"):
        return passes
    return [*passes, make_pass("plan-memory", {})]


class _Maker:
    """Makes results of one program: compresses, lowers, checks and measures."""

    def __init__(
        self, program: Program, passes: list[Pass], watchers: tuple[Callable[[Step], None], ...],
        context: PassContext, recipe: Recipe, backend: str, target: str, settings: Settings,
        evaluate: Callable[..., Any] | None, estimator: Estimator,
    ) -> None:  # fmt: skip
        self.program, self.context, self.recipe = program, context, recipe
        self.backend, self.target, self.settings = backend, target, settings
        self.evaluate, self.watchers, self.passes = evaluate, watchers, passes
        context.progress.stage("Compressing")
        self._common = Recipe.load(BASELINE).passes()
        # Most recipes begin with what the baseline runs.
        self._shared = passes[: len(self._common)] == self._common
        self.base = Pipeline(self._common, watchers if self._shared else ()).run(program, context)
        assert context.allowance is not None
        self.allowance = context.allowance
        self.baseline_artifact = self._uncompressed()
        self._round_started = time.monotonic()
        self._round_seconds = 0.0
        self.estimator = estimator
        context.progress.step(0, 1, "estimates of the uncompressed model")
        self.baseline_cost = estimator.cost(self.baseline_artifact)
        self._quality: Quality | None = None
        self._eager: Side | None = None

    def _uncompressed(self) -> Artifact:
        """The uncompressed model, lowered; only its size where it would not fit into memory."""
        whole = self.base.size_bytes()
        if not self.settings.uncompressed_beside:
            return _weights_alone(self.base)
        if self.allowance.fits(_LOWERED_TIMES * whole):
            artifact = lower(self.base, self.backend, target=self.target)
            with artifact.load(apart=True) as loaded:
                check_parity(self.base, loaded, self.program, cache=self.context.cache)
            return artifact
        self.allowance.say(
            f"the uncompressed model ({whole / 1e9:.2f} GB) was not built beside the result, for "
            "want of memory: its size is that of its weights, no times are compared, and the "
            "result is checked at one input size"
        )
        return _weights_alone(self.base)

    def has_time_for_another(self) -> bool:
        """Whether a round as long as the last would end in time."""
        if self._round_seconds < self.allowance.seconds_left():
            return True
        self.allowance.say(
            f"no further choice was tried: {self.allowance.seconds_left():.0f} s were left, the "
            f"last one took {self._round_seconds:.0f} s"
        )
        return False

    def compress(self, seen: tuple[Observation, ...]) -> Program:
        """The program after all passes, which are told what came of earlier results."""
        self._round_started = time.monotonic()
        if seen:
            self.context.progress.stage("Choosing again")
        before = self.baseline_cost
        baseline = Baseline(
            self.baseline_artifact.size_bytes,
            before.milliseconds if before else None,
            energy_mj=before.cost.energy_mj if before else None,
        )
        context = replace(self.context, observations=seen, baseline=baseline)
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
        once = self.settings.uncompressed_beside and not self.baseline_artifact.manifest["parts"]
        with artifact.load(apart=True) as loaded:
            parity = check_parity(
                result, loaded, self.program, sizes=1 if once else 2, cache=self.context.cache
            )
            store_sample(result, artifact, loaded)
            sizes = "one input size" if parity.sizes == 1 else f"{parity.sizes} input sizes"
            progress.end(f"{self.backend}, checked at {sizes}")
            progress.stage("Checking", "quality")
            batches = list(islice(data, QUALITY_BATCHES)) if data is not None else []
            quality = measure_quality(
                self.program, loaded, self.evaluate, batches, progress, self._quality,
                self.context.cache,
            )  # fmt: skip
        self._quality = quality
        batch_word = "batch" if quality.batches == 1 else "batches"
        metric_word = f", {quality.result.name}" if quality.result else ""
        progress.end(f"outputs on {quality.batches} {batch_word}{metric_word}")
        timing = self._timing(artifact)
        cost = self.estimator.cost(artifact)
        slower = {}
        if timing is not None and self.context.budget is not None:
            progress.step(0, 1, "times of layers")
            slower = self.estimator.slower_layers(
                (self.baseline_artifact, self.baseline_cost), (artifact, cost),
                self.settings.threads,
            )  # fmt: skip
        self._round_seconds = time.monotonic() - self._round_started
        before = self.baseline_cost
        return Attempt(result, artifact, parity, quality, timing, cost, before, slower)

    def _timing(self, artifact: Artifact) -> Timing | None:
        settings, progress = self.settings, self.context.progress
        if not (settings.measure and self.program.coverage.is_whole):
            return None
        if not self.baseline_artifact.manifest["parts"]:
            return None
        seconds = min(settings.measure_seconds, _MEASURE_SHARE * self.allowance.seconds_left())
        if seconds < settings.measure_seconds:
            shorter = f"for {seconds:.0f} s" if seconds >= 1 else "not at all"
            self.allowance.say(f"the result was timed {shorter}, to end in time")
            if seconds < 1:
                return None
        progress.stage("Measuring")
        beside = settings.eager_beside and _fits_eager(self.program)
        eager: Artifact | Side | None = self._eager
        if eager is None and beside:
            eager = lower(self.program, "eager")
        timing = measure_speed(
            self.baseline_artifact, artifact, eager, threads=settings.threads,
            seed=self.context.seed, max_seconds=seconds, progress=progress,
        )  # fmt: skip
        self._eager = timing.eager
        progress.end(f"{timing.comparison.pairs} alternated pairs of fresh processes")
        return timing


def _weights_alone(program: Program) -> Artifact:
    """A stand-in for a program that is not lowered: as large as its weights, nothing to run."""
    size = program.size_bytes()
    manifest = {
        "model": program.name, "backend": "", "kind": "weights", "parts": [],
        "files": {"weights": {"bytes": size, "sha256": ""}},
    }  # fmt: skip
    return Artifact(Path(), manifest, program=program)


def _count(number: float) -> str:
    for size, word in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return str(int(number))


def _fits_eager(program: Program) -> bool:
    return not find_backend("eager").unsupported(program)


def _check_budget(budget: Budget, attempt: Attempt, baseline: Artifact) -> None:
    missed = attempt.missed(budget, baseline)
    if not missed:
        return
    choice = attempt.result.plan.get("choice", {})
    hint = "loosen it, or take a recipe that compresses more or less"
    if choice:
        binding = ", ".join(choice.get("binding") or ["none of the limits in the estimates"])
        hint = f"binding: {binding}; nearest point found: {nearest_point(attempt, baseline)}"
        size, least = budget.get("size"), choice.get("least_if_slower", {}).get("size")
        if size and least and size.is_met(least, baseline.size_bytes):
            hint += "; formats that were refused as slower would be small enough: --allow-slower"
    raise BudgetNotMet(
        "the budget is not met: " + "; ".join(missed), artifact=attempt.artifact, hint=hint
    )
