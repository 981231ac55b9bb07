"""What 8-bit activations would cost, tried on a few rows of calibration data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mopt.formats.base import row_pieces
from mopt.formats.grid import min_max_grid
from mopt.formats.int_rows import Int8Dynamic

Change = Callable[[Tensor], Tensor]


def rounded_error(rows: Tensor, weights: list[Tensor], change: Change | None = None) -> float:
    """Squared error of all outputs with activations and weights in int8.

    ``change`` is what becomes of rows of weights before they are rounded; what it stands for has
    been done to ``rows``. Activations are rounded over one range for the whole of ``rows``, weights
    per output channel to all that occurs: of the search for ranges, these changes change little.
    """
    return output_error_of(rows, round_rows(rows), weights, change)


def round_rows(rows: Tensor) -> Tensor:
    """``rows`` in 8 bits over one range for all of them, as floats."""
    grid = min_max_grid(rows.amin(), rows.amax(), 8, symmetric=False)
    assert grid.zero_points is not None
    codes = (rows / grid.scales).round() + grid.zero_points
    return (codes.clamp(0, 255) - grid.zero_points) * grid.scales


def output_error_of(
    rows: Tensor, rounded: Tensor, weights: list[Tensor], change: Change | None = None
) -> float:
    """Squared error of all outputs for ``rounded`` instead of ``rows``, with weights in int8."""
    form = Int8Dynamic()
    total = 0.0
    for weight in weights:
        for at in row_pieces(weight):
            part = weight[at].float()
            part = part if change is None else change(part)
            grid = form.grid(part, ranges="min-max")
            near = form.quantize_columns(part, grid, part.shape[1], 0)
            # One product for the difference: A'R - AW = (A' - A)R + A(R - W).
            wrong = (rounded - rows) @ near.t() + rows @ (near - part).t()
            total += float(wrong.square().sum(dtype=torch.float64))
    return total


def spread_rows(value: Tensor, count: int) -> Tensor:
    """``count`` rows of the last axis, evenly spread; all of them if there are no more."""
    rows = value.reshape(-1, value.shape[-1]).float()
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]
