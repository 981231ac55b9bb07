"""Scales and zero points for groups of weights: the range search, apart from the rounding.

All formulas are those of affine quantization with unsigned codes q in 0..2**bits-1 and values
``(q - zero) * scale``. A symmetric grid has its zero in the middle, at ``2**(bits-1)``, and so one
level more below zero than above. A search for few bits turns that level to the side where the group
has its largest weight: the scale is negative where that side is the positive one. At 4 bits this
takes 9 to 14 percent off the squared error of normally distributed weights, for no bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopt.machine import is_crowded

SCALE_FLOOR = 1e-8
# Rows are searched in pieces of about this many values, so that a piece stays in the cache.
_PIECE = 1 << 18
_PIECE_OF_ONE_THREAD = 30_000  # so few that PyTorch does not divide them between threads
_FACTORS = {  # on the min-max range
    2: tuple(0.30 + 0.035 * i for i in range(25)),
    3: tuple(0.46 + 0.027 * i for i in range(23)),
    4: tuple(0.58 + 0.021 * i for i in range(21)),
    8: tuple(0.86 + 0.014 * i for i in range(11)),
}
_REFINEMENTS = 2
# Floats around these are whole numbers.
_WHOLE = {torch.float32: 1.5 * 2**23, torch.float64: 1.5 * 2**52}


@dataclass(frozen=True)
class Grid:
    """The levels of a weight (rows, columns): one scale per row and group of columns.

    ``scales`` (rows, groups) are finite and not zero; they are negative only in symmetric grids of
    fewer than 8 bits that were searched for the least error. ``zero_points`` (rows, groups) are
    integer codes as floats, None for a symmetric grid. Grids of unevenly spaced levels may have
    ``tables`` (rows, groups), the index of the table that each group uses, and ``tensor_scale``,
    the scalar that is part of all scales and stored apart.
    """

    scales: Tensor
    zero_points: Tensor | None = None
    tables: Tensor | None = None
    tensor_scale: Tensor | None = None

    def rows(self, at: slice) -> Grid:
        """The grid of some rows of the weight."""
        zeros = None if self.zero_points is None else self.zero_points[at]
        tables = None if self.tables is None else self.tables[at]
        return Grid(self.scales[at], zeros, tables, self.tensor_scale)

    @staticmethod
    def join(grids: list[Grid]) -> Grid:
        """The grid of a weight from the grids of its slices, left to right."""
        zeros = [g.zero_points for g in grids if g.zero_points is not None]
        return Grid(
            torch.cat([g.scales for g in grids], dim=1), torch.cat(zeros, dim=1) if zeros else None
        )


def values_at_a_time() -> int:
    """How many values to work on at once where that changes no result.

    On a machine with other work to do so few that one thread computes with them.
    """
    return _PIECE_OF_ONE_THREAD if torch.get_num_threads() > 1 and is_crowded() else _PIECE


def min_max_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    """The narrowest grid that holds [low, high] and zero; scale 1 where the range is empty.

    ``low`` and ``high`` may have any one shape; results are float32 of that shape.
    """
    bottom, top = low.double().clamp(max=0), high.double().clamp(min=0)
    if symmetric:
        scale = torch.maximum(-bottom, top) / (2 ** (bits - 1) - 1)
        return Grid(_safe(scale))
    scale = _safe((top - bottom) / (2**bits - 1))
    zero = round_(-bottom / scale.double()).clamp(0, 2**bits - 1)
    return Grid(scale, zero.float())


def search_grid(
    weight: Tensor,
    group: int,
    bits: int,
    *,
    symmetric: bool,
    ranges: str = "mse",
    importance: Tensor | None = None,
) -> Grid:
    """A grid for ``weight`` (rows, columns) in groups of ``group`` columns, the last may be short.

    "min-max" covers every value. "mse" tries ranges from narrow to slightly wide, keeps per group
    the one with the smallest squared error, and then improves its scale by least squares for the
    codes found; it is never worse than min-max. ``importance`` weighs the squared errors per column
    (columns), or pairs of errors of one group (columns, columns): with the second moment of the
    input, what is minimized is the error of the output that each group causes.
    """
    rows, columns = weight.shape
    pad = -columns % group
    weigh = None
    if importance is not None or pad:
        weigh = torch.ones(columns) if importance is None else importance.float()
        weigh = _by_group(weigh.to(weight.device), group, pad)
    # With weights for pairs of errors, and in long rows, sums depend on how the work is divided.
    divisible = columns + pad <= _PIECE_OF_ONE_THREAD and (weigh is None or weigh.dim() == 2)
    step = max(1, (values_at_a_time() if divisible else _PIECE) // (columns + pad))
    pieces = []
    for start in range(0, rows, step):
        piece = torch.nn.functional.pad(weight[start : start + step].float(), (0, pad))
        pieces.append(_search(piece.view(len(piece), -1, group), weigh, bits, symmetric, ranges))
    zeros = [p.zero_points for p in pieces if p.zero_points is not None]
    return Grid(torch.cat([p.scales for p in pieces]), torch.cat(zeros) if zeros else None)


def _by_group(importance: Tensor, group: int, pad: int) -> Tensor:
    """Weights of errors (groups, group), or of pairs of errors (groups, group, group)."""
    if importance.dim() == 1:
        return torch.nn.functional.pad(importance, (0, pad)).view(-1, group)
    count = (len(importance) + pad) // group
    blocks = importance.new_zeros(count, group, group)
    for at in range(count):
        own = importance[at * group : (at + 1) * group, at * group : (at + 1) * group]
        blocks[at, : len(own), : len(own)] = own
    return blocks


def _search(x: Tensor, weigh: Tensor | None, bits: int, symmetric: bool, ranges: str) -> Grid:
    low, high = x.amin(-1), x.amax(-1)
    start = min_max_grid(low, high, bits, symmetric)
    if ranges == "min-max":
        return start
    scale, zero = start.scales, start.zero_points
    best = _error(x, _levels(x, scale, zero, bits), scale, weigh)
    sign = torch.where((high > -low) & (bits < 8), -1.0, 1.0) if symmetric else 1.0
    factors = low.new_tensor(_FACTORS[bits]).view(-1, 1, 1)
    tried = min_max_grid(low * factors, high * factors, bits, symmetric)
    offsets = [None] * len(factors) if tried.zero_points is None else tried.zero_points
    for step, offset in zip(tried.scales * sign, offsets, strict=True):
        error = _error(x, _levels(x, step, offset, bits), step, weigh)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, step, scale)
        if zero is not None and offset is not None:
            zero = torch.where(better, offset, zero)
    for _ in range(_REFINEMENTS):
        codes = _levels(x, scale, zero, bits)
        weighed = codes if weigh is None else _weighed(codes, weigh)
        fitted = (weighed * x).sum(-1) / (weighed * codes).sum(-1)
        fitted = torch.where(fitted.isfinite() & (fitted.abs() > SCALE_FLOOR), fitted, scale)
        error = _error(x, _levels(x, fitted, zero, bits), fitted, weigh)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, fitted, scale)
    return Grid(scale, zero)


def _levels(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes less the zero point, as floats."""
    codes = round_(torch.div(x, scale.unsqueeze(-1)))
    if zero is None:
        return codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    offset = zero.unsqueeze(-1)
    return torch.clamp(codes, -offset, 2**bits - 1 - offset)


def round_(values: Tensor) -> Tensor:
    """To the nearest whole number, ties to even, as far as numbers of a few bits reach.

    What is far outside stays far outside. ``Tensor.round_`` divides even small work among threads.
    """
    whole = _WHOLE[values.dtype]
    return values.add_(whole).sub_(whole)


def _error(x: Tensor, codes: Tensor, scale: Tensor, weigh: Tensor | None) -> Tensor:
    error = torch.addcmul(x, codes, scale.unsqueeze(-1), value=-1)
    return (error.square_() if weigh is None else _weighed(error, weigh).mul_(error)).sum(-1)


def _weighed(values: Tensor, weigh: Tensor) -> Tensor:
    """``values`` (rows, groups, group) times the weights of their errors."""
    if weigh.dim() == 2:
        return values * weigh
    return torch.einsum("rgi,gij->rgj", values, weigh)


def _safe(scale: Tensor) -> Tensor:
    floored = scale.clamp(min=SCALE_FLOOR).float()
    return torch.where(scale > 0, floored, torch.ones_like(floored))
