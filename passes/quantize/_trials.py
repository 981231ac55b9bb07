"""What 8-bit activations would cost, tried on a few rows of calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from mopt.formats.grid import min_max_grid
from mopt.formats.int_rows import Int8Dynamic


def rounded_error(rows: Tensor, weights: list[Tensor], factors: Tensor) -> float:
    """Squared error of all outputs with activations and weights in int8 behind ``factors``.

    Activations are rounded over one range for the whole of ``rows``, weights per output channel to
    all that occurs: of the search for ranges, factors change little.
    """
    form = Int8Dynamic()
    scaled = rows / factors
    grid = min_max_grid(scaled.amin(), scaled.amax(), 8, symmetric=False)
    assert grid.zero_points is not None
    codes = (scaled / grid.scales).round() + grid.zero_points
    activations = (codes.clamp(0, 255) - grid.zero_points) * grid.scales
    total = 0.0
    for weight in weights:
        columns = weight * factors
        grid = form.grid(columns, ranges="min-max")
        rounded = form.quantize_columns(columns, grid, columns.shape[1], 0)
        # One product for the difference: A'R - AW = (A' - AF)R + AF(R - WF), with F the factors.
        wrong = (activations - scaled) @ rounded.t() + scaled @ (rounded - columns).t()
        total += float(wrong.square().sum(dtype=torch.float64))
    return total


def spread_rows(value: Tensor, count: int) -> Tensor:
    """``count`` rows of the last axis, evenly spread; all of them if there are no more."""
    rows = value.reshape(-1, value.shape[-1]).float()
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]
