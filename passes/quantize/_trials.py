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
    scaled = rows / factors
    return output_error_of(scaled, round_rows(scaled), [weight * factors for weight in weights])


def round_rows(rows: Tensor) -> Tensor:
    """``rows`` in 8 bits over one range for all of them, as floats."""
    grid = min_max_grid(rows.amin(), rows.amax(), 8, symmetric=False)
    assert grid.zero_points is not None
    codes = (rows / grid.scales).round() + grid.zero_points
    return (codes.clamp(0, 255) - grid.zero_points) * grid.scales


def output_error_of(rows: Tensor, rounded: Tensor, weights: list[Tensor]) -> float:
    """Squared error of all outputs for ``rounded`` instead of ``rows``, with weights in int8."""
    form = Int8Dynamic()
    total = 0.0
    for weight in weights:
        grid = form.grid(weight, ranges="min-max")
        near = form.quantize_columns(weight, grid, weight.shape[1], 0)
        # One product for the difference: A'R - AW = (A' - A)R + A(R - W).
        wrong = (rounded - rows) @ near.t() + rows @ (near - weight).t()
        total += float(wrong.square().sum(dtype=torch.float64))
    return total


def spread_rows(value: Tensor, count: int) -> Tensor:
    """``count`` rows of the last axis, evenly spread; all of them if there are no more."""
    rows = value.reshape(-1, value.shape[-1]).float()
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]
