"""Move biases that only shift a value from one layer into the next (high-bias absorption)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.effects import argument
from mopt.layers import LINEAR
from mopt.observers import Observer
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, option, register_pass
from mopt.passes.quantize._pairs import (
    NORMAL,
    RELU,
    channel_axis,
    find_pairs,
    groups_of,
    replace_argument,
)
from mopt.program import Program, site_of


@register_pass("absorb-biases", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class AbsorbBiases(Pass):
    """Move biases that only shift a value from one layer into the next.

    ## When to use
    Behind `equalize-channels`, which may leave large biases, and before int8 with one range for
    all channels of a value: a channel that always lies high takes range from the others.

    ## Accuracy
    High-bias absorption of Nagel et al. 2019 ("Data-Free Quantization", section 4.1.3): with mean m
    and deviation d of a channel in front of a relu, c = max(0, m - `deviations` * d) is taken off
    its bias, and the weights behind it times c are added to the biases there. Nothing changes where
    the channel stays above c, which with three deviations of a normal distribution is 99.87 percent
    of it. The means come from the batch norms that were folded in front of this pass, so no data is
    needed; where there were none, from calibration data.

    ## Limits
    Pairs of layers with only a relu between them. A layer behind that pads its input is left out:
    the padding is zero and would not hold c.

    ## Example
    A channel around 8 with deviation 1 gets 5 off its bias, and so lies around 3.
    """

    deviations: float = option(3.0, min=0, help="how far below the mean the channel must stay")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        pairs, skipped = find_pairs(program, self)
        usable = []
        for first, second in pairs:
            reason = _reason(first, second)
            if reason:
                skipped.append(Skip(site_of(second), reason))
            else:
                usable.append((first, second))
        missing = {first: ChannelMoments(channel_axis(first)) for first, _ in usable
                   if NORMAL not in first.meta}  # fmt: skip
        if missing and ctx.calibration is not None:
            observers: dict[fx.Node, Observer] = {**missing}
            ctx.calibration.for_part(program).collect(observers, ctx)
        moved: dict[str, float] = {}
        for first, second in usable:
            if first in missing and ctx.calibration is None:
                skipped.append(
                    Skip(site_of(first), "no batch norm was folded here, and no data is given")
                )
                continue
            mean, deviation = missing[first].result() if first in missing else first.meta[NORMAL]
            amount = (mean - self.deviations * deviation).clamp(min=0)
            if not bool(amount.any()):
                continue
            _absorb(program, first, second, amount)
            if NORMAL in first.meta:
                first.meta[NORMAL] = (mean - amount, deviation)
            moved[site_of(first)] = float(amount.max())
        stats: dict[str, Any] = {"layers": len(moved), "largest": moved}
        return PassResult(changed=bool(moved), stats=stats, skipped=skipped)


class ChannelMoments:
    """Mean and deviation per channel of a value, over all else and all batches."""

    def __init__(self, axis: int) -> None:
        self._axis, self._count = axis, 0
        self._sum = self._squares = torch.zeros(())

    def add(self, value: Tensor) -> bool:
        """Take in a batch; False if it holds NaN or infinity."""
        rows = value.detach().movedim(self._axis, -1).flatten(0, -2).double()
        if not bool(torch.isfinite(rows).all()):
            return False
        self._sum = self._sum + rows.sum(0)
        self._squares = self._squares + rows.square().sum(0)
        self._count += len(rows)
        return True

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (channels), float64."""
        mean = self._sum / max(self._count, 1)
        return mean, (self._squares / max(self._count, 1) - mean.square()).clamp(min=0).sqrt()


def _reason(first: fx.Node, second: fx.Node) -> str | None:
    between = next(iter(first.users))
    if between.target not in RELU or next(iter(between.users)) is not second:
        return "there is no relu before it that a shift could pass"
    if second.target not in LINEAR:
        padding = argument(second, "padding")
        if any(padding if isinstance(padding, list | tuple) else [padding]):
            return "it pads its input with zeros, which a shift would change"
    return None


def _absorb(program: Program, first: fx.Node, second: fx.Node, amount: Tensor) -> None:
    """Take ``amount`` off the first layer's outputs and give the second what it would miss."""
    weight = program.constant(second.args[1])
    assert weight is not None
    groups = groups_of(second)
    # (outputs, inputs of a group) times the amounts of each output's group.
    columns = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
    shares = amount.view(groups, -1)
    more = torch.einsum("goi,gi->go", columns.unflatten(0, (groups, -1)), shares).flatten()
    for call, change in ((first, -amount), (second, more)):
        bias = program.constant(argument(call, "bias"))
        total = change if bias is None else bias.double() + change
        replace_argument(program, call, 2, total, "absorbed")
