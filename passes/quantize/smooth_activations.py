"""Move large activations into the weights before both are rounded to 8 bits (SmoothQuant)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopt.formats.base import require_finite, row_pieces
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
from mopt.passes.quantize._calibrated import visit_inputs
from mopt.passes.quantize._scales import find_edges_to_scale, scale_edge
from mopt.passes.quantize._trials import rounded_error, spread_rows
from mopt.program import Program
from mopt.streaming import Stream

_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
# A multiplication is inserted only where the error falls below this share of what it was.
_WORTH_A_PRODUCT = 0.5


@register_pass("smooth-activations", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class SmoothActivations(Pass):
    """Move large activations into the weights before both are rounded to 8 bits.

    ## When to use
    Before weights and activations are rounded to int8, for models whose activations have a few
    channels that are much larger than the rest, as most language models' have.

    ## Accuracy
    Rounding: the function stays, factors are folded in float64 and rounded once. The factors are
    those of SmoothQuant (Xiao et al. 2022): a^strength / w^(1 - strength), with a and w the
    largest magnitudes of a channel in the activations and in all weights that read it. With
    `strength = 0` every edge searches its own among 0.3 to 0.95 and no smoothing, for the least
    error of its layers' outputs on up to `rows` rows of calibration data, rounded as they will be.

    ## Limits
    Factors go into a norm with a weight, or into the linear layer before (directly, through a
    relu, through the product of a gate, or through attention whose heads each have their own
    values). Other edges are left alone, unless `insert` allows a multiplication in front of their
    layers: behind GELU and the like that costs little beside an int8 layer, and it is placed only
    where the search finds that it halves the error.

    ## Example
    gamma of a layer norm is divided by s, the columns of the layers behind it multiplied by s.
    """

    strength: float = option(0.0, min=0, max=1, help="0: search one per edge")
    insert: bool = option(False, help="multiply where nothing before a layer takes the factors")
    rows: int = option(512, min=1, help="rows of activations that the search compares on")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        edges, skipped = find_edges_to_scale(program, self.selects, insert=self.insert)
        for edge in edges:
            for layer in edge.group.layers:
                require_finite(program.weight(layer.weight), layer.path, layer.source)
        if not edges:
            return PassResult(changed=False, stats={"edges": 0}, skipped=skipped)
        by_inputs = {edge.group.inputs: edge for edge in edges}
        stream = Stream(program, ctx.calibration.for_part(program), ctx)
        found: dict[str, Tensor] = {}
        strengths: dict[str, float] = {}
        for group, value, _ in visit_inputs(program, stream, [edge.group for edge in edges]):
            edge = by_inputs[group.inputs]
            ctx.progress.step(len(strengths), len(edges), "edges")
            ctx.check_time(f"smoothing the inputs of {edge.path}")
            weights = [program.weight(layer.weight).float() for layer in group.layers]
            values = stream.values(value)
            below = 1.0 if edge.maker is not None else _WORTH_A_PRODUCT
            strengths[edge.path], factors = self._search(values, weights, below)
            if factors is not None:
                found[edge.path] = factors
            else:
                skipped.append(
                    Skip(edge.path, "no smoothing lowers the error of its outputs enough")
                )
        for edge in edges:
            if edge.path in found:
                scale_edge(program, edge, found[edge.path])
        stats = {"edges": len(found), "strength": strengths,
                 "peak_activation_bytes": stream.peak_bytes}  # fmt: skip
        return PassResult(changed=bool(found), stats=stats, skipped=skipped)

    def _search(
        self, values: list[Tensor], weights: list[Tensor], below: float
    ) -> tuple[float, Tensor | None]:
        """The best strength and its factors; 0 and None where none brings the error ``below``.

        ``below`` is a share of the error without smoothing.
        """
        seen = ChannelStatistics()
        for value in values:
            seen.add(value)
        largest = torch.stack(
            [weight[at].abs().amax(0) for weight in weights for at in row_pieces(weight)]
        ).amax(0)
        if self.strength:
            return self.strength, smoothing_factors(seen.largest, largest, self.strength)
        share = max(1, self.rows // len(values))
        rows = torch.cat([spread_rows(value, share) for value in values])
        best: tuple[float, Tensor | None] = (0.0, None)
        error = below * rounded_error(rows, weights)
        for strength in _STRENGTHS:
            factors = smoothing_factors(seen.largest, largest, strength)
            tried = rounded_error(rows / factors, weights, factors.mul)
            if tried < error:
                best, error = (strength, factors), tried
        return best


def smoothing_factors(activations: Tensor, weights: Tensor, strength: float) -> Tensor:
    """a^strength / w^(1 - strength) from the largest magnitudes per channel; float32, positive."""
    a, w = activations.double().clamp(min=1e-5), weights.double().clamp(min=1e-5)
    return (a.pow(strength) / w.pow(1 - strength)).clamp(min=1e-5).float()
