"""Streaming statistics and the ranges estimated from them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mopt.formats.grid import min_max_grid
from mopt.observers import ChannelStatistics, Histogram, MinMax
from mopt.ranges import METHODS, estimate_range, range_observer

batches_of_values = st.lists(
    st.tuples(
        st.integers(0, 10_000), st.integers(1, 300), st.integers(-6, 6), st.floats(-50, 50)
    ),
    min_size=1, max_size=6,
)  # fmt: skip


def values(batches: list[tuple[int, int, int, float]]) -> list[Tensor]:
    """Batches of very different scale and position."""
    return [
        torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 10.0**power + shift
        for seed, count, power, shift in batches
    ]


@given(batches_of_values)
def test_a_growing_histogram_loses_no_count(batches: list[tuple[int, int, int, float]]) -> None:
    histogram, data = Histogram(), values(batches)
    for batch in data:
        assert histogram.add(batch)
    everything = torch.cat(data)
    assert histogram.total == everything.numel()
    assert (histogram.low, histogram.high) == (float(everything.min()), float(everything.max()))
    # Each count lies in the right bin, up to rounding at its edges.
    edge = histogram.start + histogram.width * (len(histogram.counts) // 2)
    slack = histogram.width * 0.01
    below = int((everything.double() < edge - slack).sum())
    above = int((everything.double() > edge + slack).sum())
    half = len(histogram.counts) // 2
    assert int(histogram.counts[:half].sum()) >= below
    assert int(histogram.counts[half:].sum()) >= above


@given(batches_of_values, st.sampled_from(METHODS), st.booleans())
def test_ranges_are_never_wider_than_what_was_seen(
    batches: list[tuple[int, int, int, float]], method: str, symmetric: bool
) -> None:
    observer, data = range_observer(method), values(batches)
    for batch in data:
        observer.add(batch)
    low, high = estimate_range(observer, method, symmetric=symmetric)
    everything = torch.cat(data)
    assert float(everything.min()) <= low <= high <= float(everything.max())
    scale = min_max_grid(torch.tensor(low), torch.tensor(high), 8, symmetric).scales
    assert math.isfinite(float(scale)) and float(scale) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-20, 7e20])
def test_a_constant_has_itself_as_its_range(method: str, value: float) -> None:
    observer = range_observer(method)
    for _ in range(3):
        observer.add(torch.full((5,), value))
    low, high = estimate_range(observer, method)
    assert low == high == pytest.approx(value, rel=1e-6)


def outlier(count: int = 200_000) -> Histogram:
    """N(0, 1) with one value of 40, in batches."""
    data = torch.randn(count)
    data[0] = 40.0
    histogram = Histogram()
    for batch in data.split(count // 7):
        histogram.add(batch)
    return histogram


def test_one_outlier_does_not_set_the_range() -> None:
    histogram = outlier()
    assert estimate_range(histogram, "min-max")[1] == 40.0
    # Published for a histogram of 2048 bins: entropy about 5.2, percentile 99.99 about 3.9.
    low, high = estimate_range(histogram, "entropy")
    assert high == pytest.approx(5.2, abs=0.4)
    assert low == histogram.low
    low, high = estimate_range(histogram, "percentile", percentile=99.99)
    assert -low == pytest.approx(3.9, abs=0.15)
    assert high == pytest.approx(3.9, abs=0.15)


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_the_best_of_the_methods_by_its_own_measure(symmetric: bool) -> None:
    data = torch.randn(50_000)
    data = torch.where(data > 2.5, data * 4, data)
    histogram = Histogram()
    histogram.add(data)
    errors = {}
    for method in ("min-max", "percentile", "mse", "entropy"):
        low, high = estimate_range(histogram, method, symmetric=symmetric)
        grid = min_max_grid(torch.tensor(low), torch.tensor(high), 8, symmetric)
        zero = torch.zeros(()) if grid.zero_points is None else grid.zero_points
        bounds = (-127, 127) if symmetric else (0, 255)
        codes = (torch.round(data / grid.scales) + zero).clamp(*bounds) - zero
        errors[method] = float((codes * grid.scales - data).square().mean())
    # The search works on bins, so another method may be ahead by a hair.
    assert errors["mse"] <= 1.01 * min(errors.values())
    assert errors["mse"] < 0.95 * errors["min-max"]


def test_many_zeros_after_a_relu_do_not_pull_the_range_in() -> None:
    data = torch.relu(torch.randn(100_000))
    histogram = Histogram()
    histogram.add(data)
    for method in METHODS:
        if method != "moving-average":
            low, high = estimate_range(histogram, method)
            assert low == pytest.approx(0, abs=1e-6)
            assert high > 3.5


def test_percentile_of_magnitudes() -> None:
    histogram = Histogram()
    histogram.add(torch.linspace(-1, 3, 4001))
    low, high = estimate_range(histogram, "percentile", symmetric=True, percentile=75)
    assert (low, high) == (-1.0, pytest.approx(2.0, abs=0.01))


@pytest.mark.parametrize("observer", [MinMax(), Histogram(), ChannelStatistics()])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_reported(
    observer: MinMax | Histogram | ChannelStatistics, bad: float
) -> None:
    assert not observer.add(torch.tensor([[1.0, bad]]))


def test_empty_batches_change_nothing() -> None:
    histogram, extremes = Histogram(), MinMax()
    for observer in (histogram, extremes):
        assert observer.add(torch.zeros(0))
        assert observer.add(torch.tensor([1.0, 2.0]))
        assert observer.add(torch.zeros(0))
    assert histogram.total == 2
    assert (extremes.low, extremes.high) == (1.0, 2.0)


def test_a_histogram_takes_other_dtypes() -> None:
    histogram = Histogram()
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64):
        histogram.add(torch.tensor([0, 1, 2], dtype=dtype))
    assert histogram.total == 12
    assert (histogram.low, histogram.high) == (0.0, 2.0)


def test_a_histogram_of_huge_values() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([-3e38, 3e38, 0.0]))
    assert histogram.total == 3
    assert histogram.counts[0] == 1
    assert histogram.counts[-1] == 1


def test_moving_average() -> None:
    extremes = MinMax(momentum=0.1)
    extremes.add(torch.tensor([-1.0, 1.0]))
    extremes.add(torch.tensor([-2.0, 11.0]))
    assert (extremes.low, extremes.high) == pytest.approx((-1.1, 2.0))


def test_channel_statistics() -> None:
    statistics = ChannelStatistics()
    data = torch.randn(4, 3, 5)
    for batch in data:
        statistics.add(batch)
    flat = data.reshape(-1, 5).double()
    assert torch.allclose(statistics.largest, flat.abs().amax(0))
    assert torch.allclose(statistics.mean_magnitude, flat.abs().mean(0))
    assert torch.allclose(statistics.mean, flat.mean(0))
    by_channel = ChannelStatistics(axis=1)
    by_channel.add(data)
    assert torch.allclose(by_channel.mean, data.double().mean((0, 2)))
