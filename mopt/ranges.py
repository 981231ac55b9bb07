"""From a histogram of values to the range that 8-bit codes shall cover."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mopt.formats.grid import min_max_grid
from mopt.observers import Histogram, MinMax

METHODS = ("min-max", "moving-average", "percentile", "mse", "entropy")
# How far each batch moves a moving average of the extremes.
MOMENTUM = 0.01
# Target levels of the entropy search: 128, as TensorRT chose for the magnitudes of int8.
_ENTROPY_LEVELS = 128
# Bins of the symmetric histogram that the entropy search works on, odd so that one is centred on
# zero. With few more bins than levels the search has one candidate and returns the full range.
_ENTROPY_BINS = 2049


def range_observer(method: str) -> MinMax | Histogram:
    """An observer that collects what ``estimate_range`` needs for ``method``."""
    if method == "moving-average":
        return MinMax(MOMENTUM)
    return MinMax() if method == "min-max" else Histogram()


def estimate_range(
    observer: MinMax | Histogram,
    method: str,
    *,
    symmetric: bool = False,
    percentile: float = 99.99,
    bits: int = 8,
) -> tuple[float, float]:
    """(low, high) for the codes to cover, never wider than what was observed.

    "min-max" is what was observed, "moving-average" what its observer averaged over batches.
    "percentile" leaves out ``100 - percentile`` percent of the values: of the largest magnitudes
    when ``symmetric``, else half of it at each end. "mse" shrinks the ends in steps of 1 percent of
    the observed range, first together and then one by one, to the least squared error after
    rounding to ``bits``. "entropy" takes the clipping threshold whose rounded distribution has the
    least Kullback-Leibler divergence from the observed one.
    """
    low, high = observer.low, observer.high
    if isinstance(observer, MinMax) or method == "min-max" or low == high:
        return low, high
    histogram = observer
    if method == "percentile":
        found = _percentile(histogram, percentile / 100, symmetric)
    elif method == "mse":
        found = _least_squares(histogram, symmetric, bits)
    else:
        assert method == "entropy", method
        threshold = _entropy_threshold(histogram)
        found = -threshold, threshold
    return max(low, found[0]), min(high, found[1])


def _percentile(histogram: Histogram, share: float, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        counts, width = _magnitudes(histogram, len(histogram.counts))
        threshold = _quantile(counts, 0.0, width, share)
        return -threshold, threshold
    tail = (1 - share) / 2
    counts, start, width = histogram.counts, histogram.start, histogram.width
    return _quantile(counts, start, width, tail), _quantile(counts, start, width, 1 - tail)


def _quantile(counts: Tensor, start: float, width: float, share: float) -> float:
    """Where the cumulated counts reach ``share`` of all, linear within a bin."""
    sums = counts.double().cumsum(0)
    wanted = share * float(sums[-1])
    at = min(int(torch.searchsorted(sums, wanted)), len(counts) - 1)
    before = float(sums[at - 1]) if at else 0.0
    inside = float(counts[at])
    return start + width * (at + ((wanted - before) / inside if inside else 0.0))


def _least_squares(histogram: Histogram, symmetric: bool, bits: int) -> tuple[float, float]:
    factors = 1 - 0.01 * torch.arange(90, dtype=torch.float64)
    used = histogram.counts > 0
    values, counts = histogram.centers()[used], histogram.counts[used].double()

    def best(low: Tensor, high: Tensor) -> tuple[float, float]:
        grid = min_max_grid(low, high, bits, symmetric)
        scale = grid.scales.double().unsqueeze(-1)
        levels = torch.round(values / scale)
        if grid.zero_points is None:
            limit = 2 ** (bits - 1) - 1
            levels = levels.clamp(-limit, limit)
        else:
            zero = grid.zero_points.double().unsqueeze(-1)
            levels = (levels + zero).clamp(0, 2**bits - 1) - zero
        error = ((values - levels * scale).square() * counts).sum(-1)
        at = int(error.argmin())
        return float(low[at]), float(high[at])

    found = best(histogram.low * factors, histogram.high * factors)
    if not symmetric:
        # An outlier at one end calls for a shorter range there only.
        for _ in range(2):
            found = best(torch.full_like(factors, found[0]), histogram.high * factors)
            found = best(histogram.low * factors, torch.full_like(factors, found[1]))
    return found


def _magnitudes(histogram: Histogram, bins: int) -> tuple[Tensor, float]:
    """Counts of absolute values in ``bins`` equal bins from 0 to the largest, and their width."""
    largest = max(abs(histogram.low), abs(histogram.high))
    width = largest / bins
    at = (histogram.centers().abs() / width).long().clamp(0, bins - 1)
    return torch.zeros(bins, dtype=torch.int64).index_add_(0, at, histogram.counts), width


def _entropy_threshold(histogram: Histogram) -> float:
    """The threshold t for which rounding to [-t, t] loses the least information.

    On a histogram over [-largest, largest], for i bins kept on each side of the middle one: P is
    the kept bins, with the mass outside added to its end bins; Q merges the kept bins into the
    target levels, as many to each, the rest to the last, and spreads each level evenly over those
    of its bins where P has something. Bins that fill no whole level stay empty in Q, which keeps
    the search from the narrow ranges where a level is one bin and Q would equal P.
    """
    largest = max(abs(histogram.low), abs(histogram.high))
    width = 2 * largest / _ENTROPY_BINS
    at = ((histogram.centers() + largest) / width).long().clamp(0, _ENTROPY_BINS - 1)
    mass = np.bincount(at.numpy(), histogram.counts.double().numpy(), _ENTROPY_BINS)
    sums = np.concatenate([[0.0], mass.cumsum()])
    middle, levels = _ENTROPY_BINS // 2, _ENTROPY_LEVELS
    best, threshold = np.inf, largest
    for kept in range(levels // 2, middle + 1):
        first, end = middle - kept, middle + kept + 1
        inside = mass[first:end]
        reference = inside.copy()
        reference[0] += sums[first]
        reference[-1] += sums[-1] - sums[end]
        each = len(inside) // levels
        used = each * levels
        filled = reference[:used] > 0
        merged = inside[:used].reshape(levels, each).sum(1)
        merged[-1] += inside[used:].sum()
        level = merged / np.maximum(filled.reshape(levels, each).sum(1), 1)
        candidate = np.zeros(len(inside))
        candidate[:used] = np.repeat(level, each) * filled
        divergence = _divergence(_smooth(reference), _smooth(candidate))
        if divergence < best:
            best, threshold = divergence, (kept + 0.5) * width
    return float(threshold)


def _smooth(counts: np.ndarray) -> np.ndarray:
    """A distribution without zeros: each empty bin gets 1e-4 of a count, taken from the others."""
    empty = counts <= 0
    filled = len(counts) - int(empty.sum())
    taken = 1e-4 * (len(counts) - filled) / max(filled, 1)
    smoothed = np.where(empty, 1e-4, np.maximum(counts - taken, 1e-4))
    return np.asarray(smoothed / smoothed.sum())


def _divergence(reference: np.ndarray, candidate: np.ndarray) -> float:
    return float((reference * np.log(reference / candidate)).sum())
