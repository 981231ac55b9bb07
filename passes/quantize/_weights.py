"""What the passes that encode one layer at a time share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mopt.formats import Encoded, Format, Grid, GridFormat
from mopt.formats.base import require_finite
from mopt.formats.level_blocks import LevelBlocks
from mopt.layers import Layer, find_layers
from mopt.pass_base import Pass, PassContext, PassResult, Skip
from mopt.program import Program


def encode_layers(
    one: Pass,
    program: Program,
    ctx: PassContext,
    kinds: tuple[str, ...],
    choose: Callable[[Layer, Tensor], Format | str],
    ranges: str,
) -> PassResult:
    """Encode every selected layer of ``kinds`` in the format that ``choose`` returns.

    ``choose`` may return a reason instead, and the format's own check may give one: the layer is
    then skipped with it. Raises InputError for a weight that holds NaN or infinity.
    """
    layers = [layer for layer in find_layers(program) if layer.kind in kinds]
    formats: dict[str, str] = {}
    error: dict[str, float] = {}
    skipped: list[Skip] = []
    for index, layer in enumerate(layers):
        ctx.progress.step(index, len(layers), "layers")
        ctx.check_time(f"encoding {layer.path}")
        if not one.selects(layer.path):
            continue
        weight = program.weight(layer.weight)
        require_finite(weight, layer.path, layer.source)
        chosen = choose(layer, weight)
        reason = chosen if isinstance(chosen, str) else chosen.check(layer, weight)
        if isinstance(chosen, str) or reason:
            skipped.append(Skip(layer.path, str(reason)))
            continue
        encoded = _encode(chosen, weight, ranges)
        error[layer.path] = relative_error(weight, chosen.decode(encoded))
        formats[layer.path] = chosen.name
        chosen.place(program, layer, encoded)
    stats: dict[str, Any] = {"layers": len(formats), "formats": formats, "weight_error": error}
    return PassResult(changed=bool(formats), stats=stats, skipped=skipped)


def _encode(chosen: Format, weight: Tensor, ranges: str) -> Encoded:
    grid: Grid | None = None
    if isinstance(chosen, GridFormat | LevelBlocks):
        grid = chosen.grid(weight, ranges=ranges)
    return chosen.encode(weight, grid=grid)


def relative_error(weight: Tensor, decoded: Tensor) -> float:
    """Squared error over the weight's own square sum: 0 is exact, 1 is as bad as all zeros."""
    reference = weight.double()
    total = float(reference.square().sum())
    wrong = float((decoded.double() - reference).square().sum())
    return wrong / total if total > 0 else wrong


def is_small(layer: Layer, min_size: int) -> str | None:
    """The reason to leave a small layer alone, or None."""
    size = torch.Size(layer.shape).numel()
    if size < min_size:
        return f"{size} weights are fewer than min_size {min_size}"
    return None


def per_column(per_group: Tensor, columns: int, group: int) -> Tensor:
    """Values (rows, groups) spread over the columns of their groups, float32."""
    return per_group.float().repeat_interleave(group, dim=1)[:, :columns]


def kernel_notice(form: Format, backend: str) -> str | None:
    """What to say at once about a format that the backend computes with as floats, or None."""
    if backend == "eager" or (backend, "cpu") in form.kernels:
        return None
    return (
        f"{form.name} has no kernel on this target: the file becomes smaller, speed and "
        "memory stay those of the float model"
    )
