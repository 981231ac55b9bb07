"""Even out the ranges of channels between neighbouring layers (cross-layer equalization)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mopt.effects import argument
from mopt.formats.base import require_finite
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, option, register_pass
from mopt.passes.quantize._pairs import NORMAL, find_pairs, groups_of, replace_argument
from mopt.program import Program, module_path

_SETTLED = 1e-3


@register_pass("equalize-channels", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class EqualizeChannels(Pass):
    """Even out the ranges of channels between neighbouring convolutions or linear layers.

    ## When to use
    Before int8 with one scale per tensor, on networks whose channels differ much in range, such as
    those with depthwise convolutions. No data is needed. Batch norms must be folded before.

    ## Accuracy
    Rounding: the function stays, factors are folded in float64 and rounded once. For each channel
    i between two layers the factor is sqrt(r1 r2) / r2 with r1 and r2 its largest weights before
    and behind (Nagel et al. 2019, "Data-Free Quantization", eq. 11), repeated until no factor
    moves by more than 0.1 percent.

    ## Limits
    The two layers must follow each other directly or through relu or leaky relu, and the value
    between them must have no other reader. relu6, hard swish and the like stand in the way.
    Transposed convolutions and shared weights are left alone.

    ## Example
    A channel with weights up to 8 before and up to 0.5 behind gets weights up to 2 in both.
    """

    sweeps: int = option(20, min=1, max=100, help="most rounds over all pairs of layers")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        pairs, skipped = find_pairs(program, self)
        weights: dict[fx.Node, Tensor] = {}
        biases: dict[fx.Node, Tensor] = {}
        for call in dict.fromkeys(call for pair in pairs for call in pair):
            weight = program.constant(call.args[1])
            assert weight is not None
            require_finite(weight, module_path(call))
            weights[call] = weight.double()
            bias = program.constant(argument(call, "bias"))
            if bias is not None:
                biases[call] = bias.double()
        moved: dict[fx.Node, bool] = {}
        total: dict[fx.Node, Tensor] = {}
        for _ in range(self.sweeps):
            ctx.check_time("equalizing channels")
            largest = 0.0
            for first, second in pairs:
                factors = _factors(weights[first], weights[second], groups_of(second))
                change = float((factors - 1).abs().max())
                if change <= _SETTLED:
                    continue
                largest = max(largest, change)
                weights[first] = weights[first] / _per_row(factors, weights[first])
                if first in biases:
                    biases[first] = biases[first] / factors
                weights[second] = scale_inputs(weights[second], factors, groups_of(second))
                moved[first] = moved[second] = True
                total[first] = total.get(first, torch.ones_like(factors)) * factors
            if largest <= _SETTLED:
                break
        for call in moved:
            replace_argument(program, call, 1, weights[call], "equalized")
            if call in biases:
                replace_argument(program, call, 2, biases[call], "equalized")
            if NORMAL in call.meta:
                by = total.get(call, torch.ones(1, dtype=torch.float64))
                call.meta[NORMAL] = tuple(one / by for one in call.meta[NORMAL])
        stats = {"pairs": len(pairs), "layers": len(moved)}
        return PassResult(changed=bool(moved), stats=stats, skipped=skipped)


def _factors(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """sqrt(r1 r2) / r2 per channel; 1 where a channel has no weights on one side."""
    before = first.flatten(1).abs().amax(1)
    grouped = second.flatten(2) if second.dim() > 2 else second.unsqueeze(2)
    behind = grouped.unflatten(0, (groups, -1)).abs().amax((1, 3)).flatten()
    sound = (before > 0) & (behind > 0)
    return torch.where(sound, (before / behind.clamp(min=1e-300)).sqrt(), torch.ones_like(before))


def scale_inputs(weight: Tensor, factors: Tensor, groups: int) -> Tensor:
    parts = weight.unflatten(0, (groups, -1))
    shape = (groups, 1, -1, *[1] * (weight.dim() - 2))
    return (parts * factors.reshape(shape)).flatten(0, 1)


def _per_row(factors: Tensor, weight: Tensor) -> Tensor:
    return factors.reshape(-1, *[1] * (weight.dim() - 1))
