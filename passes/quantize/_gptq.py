"""Rounding a weight so that later columns make up for the errors of earlier ones (GPTQ).

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", with scales fixed beforehand, so that the order of the columns need not be stored.
Letters as there: W the weight, H the second moment of its inputs, U the upper Cholesky factor of
the inverse of H, E the scaled errors.

Afterwards the result may be refined: scales are fitted by least squares to the codes, and single
codes are moved wherever that lowers the error (coordinate descent, as in QuantEase, Behdin et al.
2023). Both steps only ever lower the error of the layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mopt.formats import Grid, GridFormat
from mopt.formats.base import row_pieces
from mopt.formats.grid import SCALE_FLOOR
from mopt.second_order import inverse_factor, times_moment

_BLOCK = 128
# A code moves only if that lowers the error by more than rounding noise of the sums behind it.
_SMALLEST_GAIN = 1e-6


@dataclass(frozen=True)
class Rounded:
    """A weight on the grid (rows, columns, float32) and how it came about.

    ``damping`` is the share of the mean of H's diagonal that was added to it, None where no amount
    helped and the weight was rounded to nearest. ``error`` is tr(D H D^T) for D the change of the
    weight and H with its damping, ``feedback_error`` the sum of the squared scaled errors, which
    equals it before refinement (and is 0 for rounding to nearest).
    """

    weight: Tensor
    grid: Grid
    damping: float | None
    error: float
    feedback_error: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """What rounding needs of a layer's inputs, made once for all rows of all layers that read them.

    ``moment`` is their second moment, float32, and ``added`` (K) what is added to its diagonal;
    ``order`` is that in which columns are rounded and ``factor`` the upper Cholesky factor of the
    inverse in it, float32, None where no damping made the moment regular.
    """

    moment: Tensor
    added: Tensor
    order: Tensor
    factor: Tensor | None
    damping: float | None

    @staticmethod
    def of(moment: Tensor, *, damping: float = 0.01, by_activation: bool = True) -> Inputs:
        """Of inputs with that second moment (K, K).

        Inputs that were always zero (dead) have no say in the order and are rounded to nearest.
        ``by_activation`` rounds the columns with the largest inputs first, while many columns are
        left to make up for them. The damping is raised tenfold, up to 0.1, where the moment cannot
        be factored.
        """
        moment = moment.float()
        diagonal = moment.diagonal()
        dead = diagonal <= 0
        scale = float(diagonal[~dead].double().mean()) if not bool(dead.all()) else 1.0
        order = torch.arange(len(moment), device=moment.device)
        if by_activation:
            order = torch.argsort(torch.where(dead, 0, diagonal), descending=True, stable=True)
        if bool(dead.any()):
            moment = moment.clone()
            moment[dead] = 0
            moment[:, dead] = 0
            moment.diagonal()[dead] = 1
        found, used = inverse_factor(moment, order, damping, scale)
        if found is None or used is None:
            return Inputs(moment, torch.zeros_like(diagonal), order, None, None)
        added = torch.full_like(diagonal, used * scale)
        return Inputs(moment, added, order, found.float().contiguous(), used)

    def times(self, rows: Tensor) -> Tensor:
        """``rows`` (n, K) times H, float64."""
        return times_moment(rows, self.moment).addcmul_(rows.double(), self.added)

    def errors(self, difference: Tensor) -> Tensor:
        """d H d^T of each row d (n), float64."""
        pieces = (difference[at] for at in row_pieces(difference))
        return torch.cat([self.times(d).mul_(d).sum(1) for d in pieces])


def round_with_feedback(
    weight: Tensor, inputs: Inputs, form: GridFormat, grid: Grid, *, refinements: int = 2
) -> Rounded:
    """Round ``weight`` (N, K) to ``grid`` for such inputs; its rows do not depend on each other."""
    w = weight.float()
    group = form.group_of(w.shape[1])
    if inputs.factor is None:
        nearest = form.quantize_columns(w, grid, group, 0)
        return Rounded(nearest, grid, None, float(inputs.errors(w - nearest).sum()))
    rounded, feedback = _feed_back(w, inputs.factor, inputs.order, form, grid, group)
    error = float(inputs.errors(w - rounded).sum())
    result = Rounded(rounded, grid, inputs.damping, error, feedback)
    for _ in range(refinements):
        better = _refine(w, inputs, form, result, group)
        if better.error >= result.error:
            break
        result = better
    return result


def _feed_back(
    w: Tensor, u: Tensor, order: Tensor, form: GridFormat, grid: Grid, group: int
) -> tuple[Tensor, float]:
    """Columns rounded in order, each error spread over the columns still to come."""
    left = w[:, order].clone()
    result = torch.empty_like(w)
    total = 0.0
    columns = order.tolist()
    for start in range(0, len(columns), _BLOCK):
        stop = min(start + _BLOCK, len(columns))
        errors = torch.empty(len(w), stop - start, device=w.device)
        for at in range(start, stop):
            column = left[:, at]
            rounded = form.quantize_columns(column[:, None], grid, group, columns[at])[:, 0]
            result[:, columns[at]] = rounded
            error = (column - rounded) / u[at, at]
            left[:, at + 1 : stop].addr_(error, u[at, at + 1 : stop], alpha=-1)
            errors[:, at - start] = error
        left[:, stop:].addmm_(errors, u[start:stop, stop:], alpha=-1)
        total += float(errors.double().square().sum())
    return result, total


def _refine(w: Tensor, inputs: Inputs, form: GridFormat, found: Rounded, group: int) -> Rounded:
    """One fit of the scales and one sweep over the codes; each row keeps what is better."""
    levels = found.weight / _per_column(found.grid.scales, w.shape[1], group)
    levels.round_()
    grid = replace(found.grid, scales=torch.cat([
        _fitted(w[at], inputs, levels[at], found.grid.scales[at], group) for at in row_pieces(w)
    ]))  # fmt: skip
    levels *= _per_column(grid.scales, w.shape[1], group)
    swept = _sweep(w, inputs, form, grid, group, levels)
    before, after = inputs.errors(w - found.weight), inputs.errors(w - swept)
    better = after < before
    scales = torch.where(better[:, None], grid.scales, found.grid.scales)
    weight = torch.where(better[:, None], swept, found.weight)
    error = float(torch.where(better, after, before).sum())
    return replace(found, weight=weight, grid=replace(grid, scales=scales), error=error)


def _per_column(per_group: Tensor, columns: int, group: int) -> Tensor:
    return per_group.float().repeat_interleave(group, dim=1)[:, :columns]


def _fitted(w: Tensor, inputs: Inputs, levels: Tensor, scales: Tensor, group: int) -> Tensor:
    """Scales with the least output error for the codes at hand: normal equations per row."""
    columns = w.shape[1]
    old, levels = scales.double(), levels.double()
    groups = old.shape[1]
    pad = groups * group - columns
    split = torch.nn.functional.pad(levels, (0, pad)).unflatten(1, (groups, group))
    target = torch.nn.functional.pad(inputs.times(w), (0, pad)).unflatten(1, (groups, group))
    right = (split * target).sum(2)
    left = torch.empty(len(w), groups, groups, dtype=torch.float64, device=w.device)
    for at in range(groups):
        own = slice(at * group, min((at + 1) * group, columns))
        part = levels[:, own] @ inputs.moment[own].double()
        part[:, own].addcmul_(levels[:, own], inputs.added[own])
        reach = torch.nn.functional.pad(part, (0, pad)).unflatten(1, (groups, group))
        left[:, at] = (split * reach).sum(2)
    # Groups whose codes are all zero have no say; a tiny ridge towards the old scale keeps them.
    ridge = 1e-6 * left.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    left.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    solved = torch.linalg.solve(left, right + ridge[:, None] * old)
    stored = solved.to(scales.dtype).double()
    ratio = stored / old
    sound = torch.isfinite(ratio) & (ratio > 0.5) & (ratio < 2) & (stored.abs() > SCALE_FLOOR)
    return torch.where(sound, stored, old).float()


def _sweep(
    w: Tensor, inputs: Inputs, form: GridFormat, grid: Grid, group: int, start: Tensor
) -> Tensor:
    """Move each code in turn to where the error of the output is least, the others fixed."""
    order = inputs.order
    result = start[:, order]
    difference = w - start
    slope = (difference @ inputs.moment).addcmul_(difference, inputs.added)[:, order]
    columns = order.tolist()
    for first in range(0, len(columns), _BLOCK):
        stop = min(first + _BLOCK, len(columns))
        reach = inputs.moment[order[first:stop]][:, order]
        reach[:, first:].diagonal().add_(inputs.added[order[first:stop]])
        moves = torch.zeros(len(w), stop - first, device=w.device)
        for at in range(first, stop):
            curvature = reach[at - first, at]
            wanted = result[:, at] + slope[:, at] / curvature
            rounded = form.quantize_columns(wanted[:, None], grid, group, columns[at])[:, 0]
            move = rounded - result[:, at]
            gain = move * (2 * slope[:, at] - move * curvature)
            worth = gain > _SMALLEST_GAIN * curvature * rounded.square()
            move = torch.where(worth, move, torch.zeros_like(move))
            result[:, at] = torch.where(worth, rounded, result[:, at])
            slope[:, at:stop].addr_(move, reach[at - first, at:stop], alpha=-1)
            moves[:, at - first] = move
        slope[:, stop:].addmm_(moves, reach[:, stop:], alpha=-1)
    back = torch.empty_like(result)
    back[:, order] = result
    return back
