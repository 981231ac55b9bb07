"""Streaming statistics of a value over batches: little is kept, and no sample of the data."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

BINS = 4096
# Values are counted in pieces of this many, so that large activations are not copied whole.
_PIECE = 1 << 22


class Observer(Protocol):
    """Sees the value of one node for every batch."""

    def add(self, value: Tensor) -> bool:
        """Take in a batch. False, and nothing taken in, if it holds NaN or infinity."""


class MinMax:
    """The smallest and largest value; with ``momentum`` their moving average over batches.

    ``low`` and ``high`` are NaN before the first value. With momentum m each batch moves them by m
    of the way towards its own extremes, so that one odd batch cannot set the range.
    """

    def __init__(self, momentum: float | None = None) -> None:
        self.low = self.high = math.nan
        self._momentum = momentum

    def add(self, value: Tensor) -> bool:
        """Take in a batch."""
        extremes = _extremes(value)
        if extremes is None:
            return value.numel() == 0
        low, high = extremes
        if math.isnan(self.low):
            self.low, self.high = low, high
        elif self._momentum is None:
            self.low, self.high = min(self.low, low), max(self.high, high)
        else:
            self.low += self._momentum * (low - self.low)
            self.high += self._momentum * (high - self.high)
        return True


class Histogram:
    """Counts in ``bins`` equal bins over a range that doubles whenever a value lies outside.

    Doubling merges neighbouring bins in pairs, so no count is lost and the observed values always
    spread over at least half of the bins. ``low`` and ``high`` are the exact extremes seen,
    ``start`` and ``width`` the left end and the width of the bins, ``counts`` int64.
    """

    def __init__(self, bins: int = BINS) -> None:
        assert bins % 2 == 0
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.low = self.high = math.nan
        self.start = self.width = 0.0

    def add(self, value: Tensor) -> bool:
        """Take in a batch."""
        extremes = _extremes(value)
        if extremes is None:
            return value.numel() == 0
        low, high = extremes
        if math.isnan(self.low):
            self.low, self.high = low, high
            # A first batch of one repeated value gets a narrow range around it.
            spread = high - low or max(abs(high), 1.0) * 1e-6
            self.start, self.width = low, spread / len(self.counts)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._cover(low, high)
        # In float32 the difference to the start of a huge range could overflow.
        exact = value.dtype == torch.float64 or self.width * len(self.counts) > 1e30
        for piece in value.detach().reshape(-1).split(_PIECE):
            piece = piece.double() if exact else piece.float()
            at = ((piece - self.start) / self.width).long().clamp_(0, len(self.counts) - 1)
            self.counts += torch.bincount(at.cpu(), minlength=len(self.counts))
        return True

    def _cover(self, low: float, high: float) -> None:
        bins = len(self.counts)
        while low < self.start or high > self.start + self.width * bins * (1 + 1e-7):
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            if low < self.start:
                self.start -= self.width * bins
                self.counts[bins // 2 :] = pairs
            else:
                self.counts[: bins // 2] = pairs
            self.width *= 2

    @property
    def total(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum())

    def centers(self) -> Tensor:
        """A value per bin, float64: its middle, and exactly 0 for the bin that holds zero."""
        index = torch.arange(len(self.counts), dtype=torch.float64)
        left = self.start + index * self.width
        holds_zero = (left <= 0) & (left + self.width > 0)
        middle = torch.where(holds_zero, torch.zeros_like(left), left + self.width / 2)
        return middle.clamp(self.low, self.high)


class ChannelStatistics:
    """Per channel of ``axis``: the largest and the mean magnitude, and the mean, float64."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.largest = torch.zeros(0)
        self.rows = 0
        self._magnitude = torch.zeros(0, dtype=torch.float64)
        self._sum = torch.zeros(0, dtype=torch.float64)

    def add(self, value: Tensor) -> bool:
        """Take in a batch."""
        rows = value.detach().movedim(self.axis, -1).reshape(-1, value.shape[self.axis])
        if not bool(torch.isfinite(rows).all()):
            return False
        if self.rows == 0:
            self.largest = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
            self._magnitude = torch.zeros_like(self.largest)
            self._sum = torch.zeros_like(self.largest)
        if len(rows):
            self.largest = torch.maximum(self.largest, rows.abs().amax(0).double())
        self._magnitude += rows.abs().sum(0, dtype=torch.float64)
        self._sum += rows.sum(0, dtype=torch.float64)
        self.rows += len(rows)
        return True

    @property
    def mean_magnitude(self) -> Tensor:
        """The mean of the absolute values per channel."""
        return self._magnitude / max(self.rows, 1)

    @property
    def mean(self) -> Tensor:
        """The mean per channel."""
        return self._sum / max(self.rows, 1)


def _extremes(value: Tensor) -> tuple[float, float] | None:
    """The smallest and largest value, None if there is none or one is NaN or infinite."""
    if value.numel() == 0:
        return None
    low, high = (float(v) for v in torch.aminmax(value.detach()))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
