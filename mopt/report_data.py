"""What the report of a compile says, as data."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from mopt import __version__
from mopt.budget import Budget
from mopt.formats.base import widened_layers
from mopt.layers import find_layers
from mopt.lowering import Artifact
from mopt.machine import machine_fingerprint
from mopt.program import Program
from mopt.proof import Parity, Quality, Timing
from mopt.recipe import Recipe
from mopt.report import SCHEMA


def report_data(
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
    """The report without what estimates and a chooser add to it."""
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
        "eager_samples_ms": [s.median_ms for s in timing.eager.samples] if timing.eager else [],
        "method": "alternated pairs of fresh processes; medians; exact sign-test interval",
    }


def _layer_rows(program: Program, result: Program) -> list[dict[str, Any]]:
    rows = []
    final = result.parts()
    for path, part in program.parts().items():
        formats = final[path].plan.get("formats", {})
        after = {name: t.numel() * t.element_size() for name, t in final[path].weights().items()}
        widened = widened_layers(final[path])
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
                    "widened": layer.path in widened,
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
