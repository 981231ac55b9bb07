"""What every kernel says of itself: its problem, its tiles, its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mopt.backends.triton.launch import Tile


@dataclass(frozen=True)
class Amount:
    """Operations, bytes of weights and of activations, and instructions of decoding."""

    flops: float
    weight_bytes: float
    activation_bytes: float
    instructions: float = 0.0

    @property
    def bytes(self) -> float:
        """Everything that is read and written."""
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True)
class Problem:
    """One use of a kernel: its sizes and kinds by name. ``rows`` is what varies at run time."""

    kernel: str
    facts: tuple[tuple[str, Any], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.facts)[name]

    def as_json(self) -> dict[str, Any]:
        """Plain data for an artifact."""
        return {"kernel": self.kernel, **dict(self.facts)}

    @property
    def text(self) -> str:
        """A key for tables."""
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.facts)])


def problem(kernel: str, **facts: Any) -> Problem:
    """A problem from its facts by name."""
    return Problem(kernel, tuple(facts.items()))


@dataclass(frozen=True)
class Kernel:
    """A kernel that a model may be lowered to: its tiles, which are legal, and its work.

    ``grid(tile, problem)`` are the blocks along rows, outputs and parts of a sum; where it is not
    given, those of a product with tiles ``BM`` by ``BN``, split in ``SPLIT``.
    """

    name: str
    space: Callable[[Problem], list[Tile]]
    legal: Callable[[Tile, Problem], str | None]
    work: Callable[[Problem], Amount]
    grid: Callable[[Tile, Problem], tuple[int, int, int]] | None = None


def read_problem(data: Mapping[str, Any]) -> Problem:
    """A problem from :meth:`Problem.as_json`."""
    facts = dict(data)
    return problem(facts.pop("kernel"), **facts)


def compute_type(dtype: torch.dtype) -> Any:
    """The type that products of an input are computed in: its own, as Triton names it."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def next_power_of_2(value: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(value - 1, 0).bit_length()


def only_tile(found: Problem) -> list[Tile]:
    """The space of a kernel that chooses its block itself."""
    return [Tile((), 4, 2)]
