"""Train weights, scales and zero points of one block after another while they are rounded."""

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

# A weight that starts on another code than its nearest stays this far from the code's border.
_INSIDE = 0.45


@register_pass("quantize-qat", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class QuantizeQat(BlockTraining):
    """Train weights, scales and zero points of one block after another while they are rounded.

    ## When to use
    For 2- and 3-bit weights, where rounding alone costs too much, and minutes to hours can be
    spent. Behind it, `tune-scales` trains all scales together for the model's outputs.

    ## Accuracy
    The first phase of EfficientQAT (Chen et al. 2024): each block computes with rounded weights,
    gradients pass the rounding straight through, and Adam moves weights, scales and zero points
    for the squared error of the block's outputs, on what the rounded blocks before give.
    `start = "gptq"` begins with the codes and scales of GPTQ instead of the nearest ones. Rates are
    in steps of the grid, so they suit weights of any size. A block whose error on the calibration
    data is not lower afterwards keeps what it started with; `error_kept` says what share is left.

    ## Limits
    Linear layers in float32. One step runs one block forwards and backwards on one calibration
    batch. The paper trains on 8 million tokens; with little data, few steps do less harm.
    3 bits are stored in 4.

    ## Example
    Two-bit weights in groups of 128 that lose less than three-bit ones rounded to nearest.
    """

    bits: int = option(2, choices=(2, 3, 4, 8), help="bits per weight")
    group: int = option(
        128, choices=(0, 16, 32, 64, 128), help="weights that share a scale; 0: a whole row"
    )
    symmetric: bool = option(False, help="no zero points: fewer bytes, a little more error")
    steps: int = option(200, min=1, help="training steps per block")
    rate: float = option(0.01, min=0, max=1, help="learning rate of weights and zero points")
    scale_rate: float = option(0.002, min=0, max=1, help="learning rate of scales, as a share")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return self._train(program, ctx, whole=True)

    def _start(
        self, layer: Layer, weight: Tensor, form: IntBlocks, start: Tensor, grid: Grid
    ) -> TrainedRounding:
        return TrainedRounding(weight, start, form, grid, self.rate, self.scale_rate)


class TrainedRounding:
    """A weight in steps of its first grid, with factors on the scales and moving zero points.

    ``start`` lies on the grid: its codes are those that it starts with.
    """

    def __init__(
        self, weight: Tensor, start: Tensor, form: IntBlocks, grid: Grid,
        rate: float, scale_rate: float,
    ) -> None:  # fmt: skip
        self._columns, self._group = weight.shape[1], form.group_of(weight.shape[1])
        self._first, self._most = grid.scales.float(), 2.0**form.bits - 1
        self._rates = rate, scale_rate
        scales = per_column(self._first, self._columns, self._group)
        codes = torch.round(start.float() / scales)
        beside = (weight.float() / scales - codes).clamp(-_INSIDE, _INSIDE)
        self.steps = (codes + beside).requires_grad_()
        self.logarithms = torch.zeros_like(self._first).requires_grad_()
        self.zeros: Tensor | None = None
        if grid.zero_points is not None:
            self.zeros = grid.zero_points.float().clone().requires_grad_()

    def parameters(self) -> list[dict[str, Any]]:
        rate, scale_rate = self._rates
        moved = [self.steps] if self.zeros is None else [self.steps, self.zeros]
        return [{"params": moved, "lr": rate}, {"params": [self.logarithms], "lr": scale_rate}]

    def weight(self) -> Tensor:
        zeros: Tensor | float = (self._most + 1) / 2
        if self.zeros is not None:
            whole = _round(self.zeros.clamp(0, self._most))
            zeros = per_column(whole, self._columns, self._group)
        factors = per_column(self.logarithms.exp(), self._columns, self._group)
        codes = torch.clamp(_round(self.steps / factors) + zeros, 0, self._most)
        return (codes - zeros) * per_column(self._scales(), self._columns, self._group)

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def final(self) -> tuple[Tensor, Grid]:
        with torch.no_grad():
            zeros = None if self.zeros is None else self.zeros.clamp(0, self._most).round()
            return self.weight(), Grid(self._scales(), zeros)

    def _scales(self) -> Tensor:
        return self._first * self.logarithms.exp()


def _round(x: Tensor) -> Tensor:
    """Rounded to even; gradients pass straight through."""
    return x + (x.round() - x).detach()
