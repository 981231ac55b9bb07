"""A matrix as the product of two thin ones, and what every rank would lose.

    found = decompose(weight, second_moment)      # whitened: the least output error there is
    found.loss(32)                                # mean squared output error per row at rank 32
    first, second = found.factors(32)             # y = second (first x)

``A`` and ``B`` are the factors of W (m outputs, n inputs) with W ~ A B, as in Wang et al. 2024,
"SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression".
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the mean of the diagonal, added where a second moment has no factor of its own.
_DAMPING = 1e-6


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition of W S, for a square S that weighs the inputs.

    ``singular`` are the singular values, largest first; ``loss(rank)`` the sum of the squares of
    those that are dropped, which is the squared error in the weighted space.
    """

    left: Tensor
    singular: Tensor
    right: Tensor  # rows are right singular vectors, times S^-1

    @property
    def full_rank(self) -> int:
        """The rank at which nothing is lost."""
        return len(self.singular)

    def loss(self, rank: int) -> float:
        """The squared error at a rank: for whitened inputs the mean of |W x - A B x|^2."""
        return float(self.singular[rank:].square().sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (rank, n) and A (m, rank), float64; both get the roots of the singular values."""
        root = self.singular[:rank].sqrt()
        return root[:, None] * self.right[:rank], self.left[:, :rank] * root


def decompose(weight: Tensor, moment: Tensor | None = None) -> Decomposition:
    """Decompose W (m, n), float64 inside.

    ``moment`` weighs the inputs: their second moment (n, n) for the least output error on them, a
    vector (n,) of factors per input for a weighted error, None for the plain decomposition.
    """
    w = weight.double()
    if moment is None:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        return Decomposition(u, s, vt)
    if moment.dim() == 1:
        scale = moment.double().clamp(min=1e-12 * float(moment.max()) or 1e-12)
        u, s, vt = torch.linalg.svd(w * scale, full_matrices=False)
        return Decomposition(u, s, vt / scale)
    root = moment_root(moment.double())
    u, s, vt = torch.linalg.svd(w @ root, full_matrices=False)
    # A triangular solve, never an inverse: the moment may be close to singular.
    right = torch.linalg.solve_triangular(root, vt, upper=False, left=False)
    return Decomposition(u, s, right)


def moment_root(moment: Tensor) -> Tensor:
    """The lower Cholesky factor, with as little added to the diagonal as it takes."""
    root, failed = torch.linalg.cholesky_ex(moment)
    scale = moment.diagonal().mean().clamp(min=1e-30)
    damping = _DAMPING
    sound = not bool(failed) and float(root.diagonal().min()) > 1e-7 * float(scale.sqrt())
    while not sound:
        damped = moment + damping * scale * torch.eye(len(moment), dtype=moment.dtype)
        root, failed = torch.linalg.cholesky_ex(damped)
        sound, damping = not bool(failed), damping * 10
    return root


def break_even(shape: Sequence[int]) -> int:
    """The largest rank at which two factors hold fewer numbers than the matrix."""
    outputs, inputs = shape
    return max((outputs * inputs - 1) // (outputs + inputs), 0)


def uniform_rank(shape: Sequence[int], ratio: float, multiple: int) -> int:
    """The rank that removes a share of a layer's parameters, a multiple rounded down, not 0."""
    outputs, inputs = shape
    rank = int((1 - ratio) * outputs * inputs / (outputs + inputs))
    return max(rank // multiple * multiple, multiple)


def allocate(
    found: Mapping[str, Decomposition], shapes: Mapping[str, tuple[int, int]], budget: int, *,
    weights: Mapping[str, float], step: int = 1, floor: float = 0.1,
) -> dict[str, int | None]:  # fmt: skip
    """Ranks with the least weighted loss whose factors hold at most ``budget`` numbers.

    None is a layer that stays dense: where factors would not be smaller. Every layer starts at
    ``floor`` of its break-even rank; ranks grow by ``step``, where that lowers the weighted loss
    most per number. Losses fall by less and less, so that taking the best step each time is optimal
    up to the last one (a fractional knapsack), and up to the jumps to dense.
    """
    ranks: dict[str, int | None] = {}
    spent = 0
    heap: list[tuple[float, str, int]] = []

    def offer(name: str, rank: int) -> None:
        """The next step of a layer: its loss per number, from the present rank on."""
        one, shape = found[name], shapes[name]
        after = rank + step
        dense = after > break_even(shape)
        cost = shape[0] * shape[1] - rank * sum(shape) if dense else step * sum(shape)
        gain = one.loss(rank) - (0.0 if dense else one.loss(after))
        heapq.heappush(heap, (-weights[name] * gain / max(cost, 1), name, -1 if dense else after))

    for name, shape in shapes.items():
        least = max(int(floor * break_even(shape)) // step * step, step)
        if least > break_even(shape):
            ranks[name] = None
            spent += shape[0] * shape[1]
        else:
            ranks[name] = least
            spent += least * sum(shape)
            offer(name, least)
    while heap:
        _, name, after = heapq.heappop(heap)
        rank, shape = ranks[name], shapes[name]
        assert rank is not None
        cost = shape[0] * shape[1] if after < 0 else after * sum(shape)
        if spent + cost - rank * sum(shape) > budget:
            continue
        spent += cost - rank * sum(shape)
        ranks[name] = None if after < 0 else after
        if after >= 0:
            offer(name, after)
    return ranks
