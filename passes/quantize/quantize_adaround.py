"""Learn for each weight whether it is rounded up or down (AdaRound, BRECQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopt.formats import Grid
from mopt.formats.int_blocks import IntBlocks
from mopt.layers import Layer
from mopt.pass_base import Numerics, PassContext, PassResult, option, register_pass
from mopt.passes.quantize._training import BlockTraining
from mopt.passes.quantize._weights import per_column
from mopt.program import Program

# The stretched sigmoid of the paper, which reaches 0 and 1: zeta and gamma.
_ZETA, _GAMMA = 1.1, -0.1
_FIRST_BETA, _LAST_BETA = 20.0, 2.0
_WARM_UP = 0.2
# How far from undecided a choice starts at least, where it starts on another code than its nearest.
_DECIDED = 0.05


@register_pass("quantize-adaround", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class QuantizeAdaround(BlockTraining):
    """Learn for each weight whether it is rounded up or down.

    ## When to use
    For 4 bits and fewer, when minutes can be spent on a small model and inputs like those the
    model will meet are at hand: a few hundred samples at least, fewer are learnt by heart.

    ## Accuracy
    AdaRound (Nagel et al. 2020) on blocks of layers, as BRECQ (Li et al. 2021) does it: scales stay
    as they are, and a soft choice between the two nearest codes of every weight is trained by Adam
    for the squared error of the block's outputs, on what the rounded blocks before give, with a
    penalty that drives every choice to one side. `blocks = "layer"` trains each layer by itself.
    The papers start with the nearest codes, which `start = "nearest"` does; `start = "gptq"` begins
    with GPTQ's codes and scales, and chooses between those and their neighbours on the side of the
    weight, which needs far fewer steps. A block whose error on the calibration data is not lower
    afterwards keeps what it started with; `error_kept` says what share is left per block. The
    Fisher weights of BRECQ are left out.

    ## Limits
    Linear layers in float32. The papers train 20 000 steps; on a CPU that takes hours, and the
    default is far shorter with a larger rate. One step runs one block forwards and backwards on
    one calibration batch; the inputs and outputs of one block are held for all batches.

    ## Example
    0.6 between the codes 0 and 1 becomes 0 where that makes up for the errors of its neighbours.
    """

    blocks: str = option(
        "module", choices=("module", "layer"),
        help="train the layers of a repeated module together, or each by itself",
    )  # fmt: skip
    rate: float = option(0.02, min=0, max=1, help="learning rate of the choices")
    penalty: float = option(1.0, min=0, help="weight of the penalty on undecided choices")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return self._train(program, ctx, whole=self.blocks == "module", penalty=self.penalty)

    def _start(
        self, layer: Layer, weight: Tensor, form: IntBlocks, start: Tensor, grid: Grid
    ) -> SoftRounding:
        return SoftRounding(weight, start, form, grid, self.rate)


class SoftRounding:
    """A weight between two neighbouring levels of its grid, by a stretched sigmoid per weight.

    One of the levels is the one that ``start`` has, the other lies towards the weight. At first it
    is the weight itself, where that lies between the two and nearer to the first.
    """

    def __init__(
        self, weight: Tensor, start: Tensor, form: IntBlocks, grid: Grid, rate: float
    ) -> None:
        self._grid, self._rate = grid, rate
        columns, group = weight.shape[1], form.group_of(weight.shape[1])
        self._scales = per_column(grid.scales, columns, group)
        most = 2**form.bits - 1
        zero = torch.full((), 2.0 ** (form.bits - 1))
        if grid.zero_points is not None:
            zero = per_column(grid.zero_points, columns, group)
        self._low, self._high = -zero, most - zero
        ratio = weight.float() / self._scales
        first = torch.round(start.float() / self._scales)
        self._base = torch.where(ratio >= first, first, first - 1)
        share = (ratio - self._base).clamp(0, 1)
        at_first = torch.where(
            first > self._base, share.clamp(min=0.5 + _DECIDED), share.clamp(max=0.5 - _DECIDED)
        )
        settled = torch.round(ratio) == first
        share = torch.where(settled, share, at_first)
        inner = ((share - _GAMMA) / (_ZETA - _GAMMA)).clamp(1e-4, 1 - 1e-4)
        self.choice = torch.logit(inner).requires_grad_()

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": [self.choice], "lr": self._rate}]

    def share(self) -> Tensor:
        """How far each weight is rounded up: 0 to 1."""
        return (torch.sigmoid(self.choice) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def weight(self) -> Tensor:
        return self._at(self.share())

    def penalty(self, progress: float) -> Tensor | None:
        """The mean of 1 - |2h - 1|^beta with beta falling from 20 to 2, after the first fifth."""
        if progress < _WARM_UP:
            return None
        done = (progress - _WARM_UP) / (1 - _WARM_UP)
        beta = _FIRST_BETA + (_LAST_BETA - _FIRST_BETA) * done
        return (1 - (2 * self.share() - 1).abs().pow(beta)).mean()

    def final(self) -> tuple[Tensor, Grid]:
        with torch.no_grad():
            return self._at((self.choice > 0).float()), self._grid

    def _at(self, share: Tensor) -> Tensor:
        return torch.clamp(self._base + share, self._low, self._high) * self._scales
