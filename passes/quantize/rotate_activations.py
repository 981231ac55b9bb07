"""Spread large activations over their neighbours before they are rounded to 8 bits (Hadamard)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopt.formats.base import require_finite, shared_weight
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, option, register_pass
from mopt.passes.quantize._calibrated import NEEDS_DATA, Group, visit_inputs
from mopt.passes.quantize._scales import find_edges_to_scale, first_reader, set_weight
from mopt.passes.quantize._trials import rounded_error, spread_rows
from mopt.program import Program
from mopt.streaming import Stream

_aten = torch.ops.aten


@register_pass("rotate-activations", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class RotateActivations(Pass):
    """Spread large activations over their neighbours before they are rounded to 8 bits.

    ## When to use
    Before weights and activations are rounded to int8, when a few large values per row, in
    changing channels, make the range wide: behind GELU and gates, above all. Channels that are
    always large are better rescaled first.

    ## Accuracy
    Rounding: the function stays. Each block of channels is multiplied by an orthogonal Hadamard
    matrix in front of the layers that read it, and their weights by the same matrix, in float64.
    Where: at the inputs whose layers' outputs, on up to `rows` rows of calibration data and
    rounded as they will be, lose at least a tenth of their error. The idea of QuaRot (Ashkboos
    et al. 2024), in blocks, and for each input by itself: nothing is folded across the residual.

    ## Limits
    Inputs of linear layers whose length is a multiple of `block`. The multiplication runs in
    float: in blocks of 32 it adds 32 products per value, beside as many as the layer has outputs.

    ## Example
    On all-MiniLM-L6-v2 the error of 4 of 6 outputs behind GELU falls by half and more.
    """

    block: int = option(32, choices=(16, 32, 64, 128), help="channels that are mixed")
    keep: float = option(0.9, min=0, max=1, help="rotate where at most this share of error is left")
    rows: int = option(512, min=1, help="rows of activations that are compared on")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        edges, skipped = find_edges_to_scale(program, self.selects, insert=True)
        groups = []
        for edge in edges:
            layer = edge.group.layers[0]
            if layer.shape[1] % self.block:
                reason = f"in_features {layer.shape[1]} is not a multiple of block {self.block}"
                skipped.append(Skip(edge.path, reason))
                continue
            for one in edge.group.layers:
                require_finite(program.weight(one.weight), one.path, one.source)
            groups.append(edge.group)
        if not groups:
            return PassResult(changed=False, stats={"edges": 0}, skipped=skipped)
        matrix = hadamard(self.block)
        stream = Stream(program, ctx.calibration.for_part(program), ctx)
        left: dict[str, float] = {}
        chosen: list[Group] = []
        for group, value, _ in visit_inputs(program, stream, groups):
            path = ",".join(layer.path for layer in group.layers)
            ctx.progress.step(len(left), len(groups), "edges")
            ctx.check_time(f"rotating the inputs of {path}")
            values = stream.values(value)
            rows = torch.cat([spread_rows(v, max(1, self.rows // len(values))) for v in values])
            weights = [program.weight(layer.weight).float() for layer in group.layers]
            left[path] = error_left(rows, weights, matrix.float())
            if left[path] <= self.keep:
                chosen.append(group)
            else:
                skipped.append(Skip(path, f"a rotation leaves {left[path]:.0%} of the error"))
        for group in chosen:
            _rotate(program, group, matrix)
        stats = {"edges": len(chosen), "error_left": left,
                 "peak_activation_bytes": stream.peak_bytes}  # fmt: skip
        return PassResult(changed=bool(chosen), stats=stats, skipped=skipped)


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix (size, size), float64; ``size`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rotate(values: Tensor, matrix: Tensor) -> Tensor:
    """Each block of the last axis times ``matrix``."""
    return (values.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def error_left(rows: Tensor, weights: list[Tensor], matrix: Tensor) -> float:
    """The squared error in 8 bits behind a rotation, as a share of that without it."""
    ones = torch.ones(rows.shape[1], device=rows.device)
    plain = rounded_error(rows, weights, ones)
    turned = [rotate(weight, matrix) for weight in weights]
    return rounded_error(rotate(rows, matrix), turned, ones) / plain if plain > 0 else 1.0


def _rotate(program: Program, group: Group, matrix: Tensor) -> None:
    value, first = group.inputs[0], first_reader(program, group)
    for layer in group.layers:
        set_weight(program, layer.calls[0], lambda weight: rotate(weight, matrix.to(weight.device)))
    count = group.layers[0].shape[1] // len(matrix)
    stored = shared_weight(program, "hadamard", matrix.to(value.meta["val"].dtype), first)
    split = program.insert_call(_aten.unflatten.int, (value, -1, [count, len(matrix)]), like=first)
    mixed = program.insert_call(_aten.matmul.default, (split, stored), like=first)
    joined = program.insert_call(_aten.flatten.using_ints, (mixed, -2, -1), like=first)
    for layer in group.layers:
        layer.calls[0].update_arg(0, joined)
