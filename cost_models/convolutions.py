"""Sizes of convolutions: the work they are, their features, and the ones that are probed."""

from __future__ import annotations

import math
from collections.abc import Callable

from mopt.cost_models.family import Amount, Dims, log, near, nice, up


def _places(dims: Dims) -> tuple[int, int, int, int, int, int]:
    """batch * output places, inputs and outputs per group, groups, kernel values, stride."""
    batch, inputs, outputs, groups, *rest = dims
    half = len(rest) // 2
    stride = rest[2 * half] if len(rest) % 2 else 1
    places = batch * math.prod(rest[:half])
    kernel = math.prod(rest[half : 2 * half])
    return places, inputs // groups, outputs // groups, groups, kernel, stride


def convolution_amount(
    weight_bytes: float, value_bytes: float, block: int = 1
) -> Callable[[Dims], Amount]:
    """The work of a convolution whose weights and values have so many bytes each."""

    def amount(dims: Dims) -> Amount:
        places, inputs, outputs, groups, kernel, stride = _places(dims)
        read = places * stride**2 * inputs * groups
        # Blocked kernels fill up their channels; a first layer of few inputs has its own.
        wide = up(inputs, block) if inputs >= block else inputs
        full = outputs if groups > 1 else up(outputs, block)
        return Amount(
            2.0 * places * wide * full * groups * kernel,
            weight_bytes * inputs * outputs * groups * kernel,
            value_bytes * read,
            value_bytes * places * outputs * groups,
            places * inputs * groups * kernel / 64,
        )

    return amount


def convolution_features(dims: Dims) -> tuple[float, ...]:
    """What its time depends on: places, channels, kernel, stride."""
    places, inputs, outputs, groups, kernel, stride = _places(dims)
    if groups > 1:
        return log(places), log(inputs * groups), log(outputs / inputs), log(kernel), stride - 1
    return log(places), log(inputs), log(outputs), log(kernel), 1.0 * (stride - 1)


def _sized(values: tuple[float, ...], most_work: float) -> tuple[int, int, int, int]:
    """inputs, outputs, size, kernel of a convolution of at most some work."""
    inputs, outputs, size, kernel = values[:4]
    taps = (1, 3, 3, 5, 7)[min(int(kernel), 4)]
    a, b = nice(2**inputs), nice(2**outputs)
    side = 2**size
    work = 2.0 * a * b * taps**2 * side**2
    if work > most_work:
        side *= math.sqrt(most_work / work)
    return a, b, max(2, round(side)), taps


def draw_convolution(values: tuple[float, ...]) -> Dims:
    """Sizes of a convolution over pictures."""
    inputs, outputs, side, taps = _sized(values, 5e8)
    if values[0] < 2.5:  # the first layer of a network reads one or three channels
        inputs = 3
    stride = 2 if values[4] > 0.7 else 1
    return 1, inputs, outputs, 1, side, side, taps, taps, stride


def draw_depthwise(values: tuple[float, ...]) -> Dims:
    """Sizes of one with a filter per channel."""
    channels = nice(2 ** values[0])
    side = max(2, round(min(2 ** values[1], math.sqrt(2**22 / channels))))
    taps = (3, 3, 5, 7)[min(int(values[2]), 3)]
    stride = 2 if values[3] > 0.6 else 1
    return 1, channels, channels, channels, side, side, taps, taps, stride


def draw_plain(values: tuple[float, ...]) -> Dims:
    """Sizes of one over lines or volumes, which have a plain kernel."""
    inputs, outputs, size, kernel, kind = values
    a, b = nice(2**inputs), nice(2**outputs)
    if kind < 0.5:
        length = round(min(2 ** (2 * size), 4e8 / (2 * a * b * 3)))
        return 1, a, b, 1, max(8, length), (1, 3, 5)[int(kernel)]
    side = max(4, round(min(2**size, (4e8 / (2 * a * b * 27)) ** (1 / 3))))
    taps = (1, 3, 3)[int(kernel)]
    return 1, a, b, 1, side, side, side, taps, taps, taps


def draw_transposed(values: tuple[float, ...]) -> Dims:
    """Sizes of one that doubles a picture."""
    inputs, outputs, side, _ = _sized((*values, 0.0), 4e8)
    side = near(side, 2)
    return 1, inputs, outputs, 1, side, side, 2, 2, 2
