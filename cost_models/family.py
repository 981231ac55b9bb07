"""What a family of operators is: one kernel, its sizes, and which are worth probing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Dims = tuple[int, ...]
# Bytes of a float.
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Amount:
    """Operations, bytes of weights, inputs and outputs, each moved once, and pieces.

    Pieces are what else costs time once each: the rows of a norm, the scores of an attention, the
    blocks of a weight, the steps of a recurrence.
    """

    flops: float
    weight_bytes: float
    input_bytes: float
    output_bytes: float
    pieces: float = 0.0

    @property
    def activation_bytes(self) -> float:
        """Inputs and outputs."""
        return self.input_bytes + self.output_bytes


@dataclass(frozen=True)
class Family:
    """A family: how much work its sizes are, its features, and the range that is probed.

    ``box`` has the least and largest value of each number that a probe is drawn from; ``draw``
    turns numbers drawn there into sizes. ``share`` is its part of the probes.
    """

    name: str
    kind: str
    amount: Callable[[Dims], Amount]
    features: Callable[[Dims], tuple[float, ...]]
    box: tuple[tuple[float, float], ...]
    draw: Callable[[tuple[float, ...]], Dims]
    share: float
    weight_format: str = "fp32"


def log(value: float) -> float:
    """Octaves; -30 for zero."""
    return math.log2(max(value, 1e-9))


def near(value: float, multiple: int) -> int:
    """The nearest multiple, at least one."""
    return max(multiple, round(value / multiple) * multiple)


def up(value: int, multiple: int) -> int:
    """The next multiple that is not smaller."""
    return -(-value // multiple) * multiple


def nice(value: float) -> int:
    """A size as models have them: a multiple of 8, of 64 when large."""
    return near(value, 64 if value > 400 else 8)
