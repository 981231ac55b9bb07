"""Rescale channels so that rounding costs less where activations are large (AWQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopt.formats.base import require_finite, row_pieces
from mopt.formats.int_blocks import IntBlocks
from mopt.observers import ChannelStatistics
from mopt.pass_base import (
    NEEDS_DATA,
    Numerics,
    Pass,
    PassContext,
    PassResult,
    Skip,
    option,
    register_pass,
)
from mopt.passes.quantize._calibrated import visit_groups
from mopt.passes.quantize._scales import Edge, find_edges_to_scale, scale_edge
from mopt.passes.quantize._weights import data_key
from mopt.program import Program
from mopt.second_order import output_error
from mopt.streaming import Stream

_POINTS = 20


@register_pass("scale-awq", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class ScaleAwq(Pass):
    """Rescale channels so that rounding weights costs less where activations are large.

    ## When to use
    Before weights are rounded to 3 or 4 bits, with inputs like those the model will meet at hand.
    The options say how they will be rounded.

    ## Accuracy
    Rounding: the function stays, factors are folded in float64 and rounded once. The factors are
    those of AWQ (Lin et al. 2023): a power of the mean magnitude per channel, from 0 (no scaling)
    to 0.95, that gives the least error of the outputs of all layers that read the channels. That
    error is computed from the second moment of the inputs, layer by layer; the paper takes the
    output of the whole attention for q, k and v. Power 0 is among those tried, so the error on the
    calibration data never grows.

    ## Limits
    Factors go into a norm with a weight, into the linear layer before (directly, through a relu,
    through the product of a gate, or through attention whose heads each have their own values).
    Other edges are left alone: an extra multiplication would cost more than the factors gain.
    The range search that AWQ calls clipping belongs to the rounding: `ranges = "output"` there.

    ## Example
    gamma of an RMS norm is divided by s, the columns of q, k and v are multiplied by s.
    """

    bits: int = option(4, choices=(2, 3, 4, 8), help="bits per weight that will be used")
    group: int = option(32, choices=(0, 16, 32, 64, 128), help="weights that will share a scale")
    symmetric: bool = option(True, help="whether the rounding will do without zero points")
    ranges: str = option("mse", choices=("mse", "min-max"), help="how scales are chosen in trials")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        edges, skipped = find_edges_to_scale(program, self.selects)
        for edge in edges:
            for layer in edge.group.layers:
                require_finite(program.weight(layer.weight), layer.path, layer.source)
        if not edges:
            return PassResult(changed=False, stats={"edges": 0}, skipped=skipped)

        def search() -> tuple[dict[str, Tensor], dict[str, Any]]:
            return self._on_data(program, ctx, edges)

        key = data_key(self, program, ctx, edges=[edge.path for edge in edges])
        if key is None or ctx.cache is None:
            found, stats = search()
        else:
            found, stats = ctx.cache.remember_tensors("factors", key, search)
        kept = "no scaling lowers the error of its outputs"
        skipped += [Skip(edge.path, kept) for edge in edges if edge.path not in found]
        for edge in edges:
            if edge.path in found:
                scale_edge(program, edge, found[edge.path])
        return PassResult(changed=bool(found), stats=stats, skipped=skipped)

    def _on_data(
        self, program: Program, ctx: PassContext, edges: list[Edge]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The factors of the edges that gain by any, and what the report says."""
        assert ctx.calibration is not None
        by_inputs = {edge.group.inputs: edge for edge in edges}
        stream = Stream(program, ctx.calibration.for_part(program), ctx)
        found: dict[str, Tensor] = {}
        powers: dict[str, float] = {}
        gains: dict[str, float] = {}
        for group, moments in visit_groups(program, stream, [edge.group for edge in edges]):
            edge = by_inputs[group.inputs]
            ctx.progress.step(len(powers), len(edges), "edges")
            ctx.check_time(f"scaling the inputs of {edge.path}")
            magnitudes = ChannelStatistics()
            for value in stream.values(group.inputs[0]):
                magnitudes.add(value)
            weights = [program.weight(layer.weight).float() for layer in group.layers]
            factors, power, gain = self._search(weights, magnitudes.mean_magnitude, moments.second)
            powers[edge.path], gains[edge.path] = power, gain
            if power > 0:
                found[edge.path] = factors
        stats = {"edges": len(found), "power": powers, "error_kept": gains,
                 "peak_activation_bytes": stream.peak_bytes}  # fmt: skip
        return found, stats

    def _search(
        self, weights: list[Tensor], magnitude: Tensor, moment: Tensor
    ) -> tuple[Tensor, float, float]:
        """The best factors, their power, and the share of the error that is left with them."""
        form = IntBlocks(self.bits, self.group, not self.symmetric)
        best, best_power, best_factors, plain = float("inf"), 0.0, torch.ones(0), 0.0
        for point in range(_POINTS):
            power = point / _POINTS
            factors = awq_factors(magnitude, power)
            error = 0.0
            for weight in weights:
                group = form.group_of(weight.shape[1])
                for at in row_pieces(weight):
                    scaled = weight[at] * factors
                    grid = form.grid(scaled, ranges=self.ranges)
                    rounded = form.quantize_columns(scaled, grid, group, 0) / factors
                    error += output_error(rounded - weight[at], moment)
            if point == 0:
                plain = error
            if error < best:
                best, best_power, best_factors = error, power, factors
        return best_factors, best_power, best / plain if plain > 0 else 1.0


def awq_factors(magnitude: Tensor, power: float) -> Tensor:
    """max(a^r, 1e-4), centred so that the largest times the smallest is 1; float32, positive."""
    factors = magnitude.double().clamp(min=1e-8).pow(power).clamp(min=1e-4)
    return (factors / (factors.max() * factors.min()).sqrt()).float()
