"""The front of best choices of a model: one solved choice per budget, nothing lowered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from mopt.budget import Budget
from mopt.cache import Cache
from mopt.calibration import Calibration
from mopt.choice import Baseline
from mopt.cost import cost_model
from mopt.device import find_device
from mopt.errors import CaptureError
from mopt.estimates import Estimator
from mopt.frontend import capture
from mopt.lowering import lower
from mopt.pass_base import PassContext, Progress
from mopt.pipeline import Pipeline
from mopt.recipe import Recipe


def solve_front(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    target: str = "host",
    along: str = "size",
    points: int = 12,
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[..., Any] | None = None,
    dynamic_shapes: Any = None,
    measure: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Points with ``budget``, ``size`` (bytes), ``latency`` (ms), ``loss`` and ``formats``.

    From the least that ``along`` ("size" or "latency") can be to the first that loses next to
    nothing (0.001 %); each has the least loss for its limit. Points that others equal are left
    out. ``measure`` times the operators of the model where ``target`` is this machine; whole models
    are not timed.
    """
    progress = progress or Progress()
    progress.stage("Capturing")
    program = capture(model, example_inputs, dynamic_shapes)
    if not program.coverage.is_whole:
        raise CaptureError(
            "parts of the model stay eager, so its parts have fronts of their own",
            code="partial-front",
            hint="compile it with --budget, which treats the parts one by one",
        )
    base = Pipeline(Recipe.load("none").passes()).run(program)
    device, cache = find_device(target), Cache()
    costs = cost_model(device, timed=measure, cache=cache, threads=threads)
    uncompressed = lower(base, target=target)
    whole_cost = Estimator(device, costs).cost(uncompressed)
    progress.end(program.name)
    progress.stage("Choosing")
    common = PassContext(
        calibration=Calibration(calibration, program) if calibration is not None else None,
        evaluate=evaluate, progress=progress, cost_model=costs, cache=cache,
        baseline=Baseline(
            uncompressed.size_bytes, whole_cost.milliseconds if whole_cost else None
        ),
    )  # fmt: skip
    chooser = [one for one in Recipe.load("auto").passes() if one.chooses]

    def choose(*budget: str) -> dict[str, Any]:
        context = replace(common, budget=Budget.parse(budget))
        done = Pipeline(chooser).run(base, context)
        choice = done.plan["choice"]
        return {
            "budget": budget[0],
            **{name: choice["estimated"][name] for name in ("size", "latency", "loss")},
            "baseline": choice["baseline"][along],
            "formats": dict(sorted(Counter(done.plan.get("formats", {}).values()).items())),
        }

    least = choose(f"minimize={along}")
    whole = least["baseline"]
    low = least[along] / whole
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for index in range(points):
        progress.step(index, points, "budgets")
        share = low + (1 - low) * index / (points - 1)
        # Rounded up, so that the first point is not just out of reach.
        point = choose(f"{along}<={share + 1e-6:.6f}x", "minimize=loss")
        found.setdefault((point[along], point["loss"]), point)
    progress.end(f"{len(found)} different points")
    front = [
        p for p in found.values()
        if not any(o is not p and o[along] <= p[along] and o["loss"] <= p["loss"]
                   for o in found.values())
    ]  # fmt: skip
    return sorted(front, key=lambda p: p[along])
