"""Work, what it costs, and who can tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mopt.program import Program


@dataclass(frozen=True)
class Work:
    """One operator on a device: what it computes and moves.

    ``kind`` is linear, convolution, attention, embedding or pointwise; ``weight_format`` names the
    format of its weight (``fp32`` when plain); byte counts are of weights and of activations read
    and written once.
    """

    kind: str
    flops: int
    weight_bytes: int
    activation_bytes: int
    weight_format: str = "fp32"
    path: str = ""
    rows: int = 1
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Estimated time in milliseconds, with a relative standard error (0.2 is 20 %)."""

    milliseconds: float
    uncertainty: float = 0.0
    energy_mj: float | None = None


class CostModel(Protocol):
    """Estimates for a device."""

    def cost(self, work: Work) -> Cost:
        """What one operator costs."""
        ...

    def program_cost(self, program: Program, works: Iterable[Work] | None = None) -> Cost:
        """What one run of a program costs."""
        ...
