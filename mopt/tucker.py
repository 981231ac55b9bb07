"""A convolution as three: fewer channels in, the same window on those, and out again (Tucker-2).

    found = decompose_kernel(weight)           # (outputs, inputs, *window)
    found.loss(32, 24)                         # squared error with 32 output, 24 input components
    first, core, last = found.factors(32, 24)  # (24, inputs), (32, 24, *window), (outputs, 32)

Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", section 3; the bases are those of the higher-order SVD, refined by a few rounds of
orthogonal iteration (De Lathauwer et al. 2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopt.low_rank import moment_root


@dataclass(frozen=True)
class Tucker:
    """A kernel in the bases of its output and input channels, the weightiest first.

    ``core`` (outputs, inputs, window) is the whole kernel in these bases; ``energy`` the squares of
    its upper left corners, summed. Errors are in the space of weighted inputs.
    """

    weighted: Tensor  # the kernel, inputs weighted, (outputs, inputs, window)
    window: tuple[int, ...]
    outer: Tensor  # (outputs, outputs), columns are components
    inner: Tensor  # (inputs, inputs)
    root: Tensor | None
    energy: Tensor

    def loss(self, outputs: int, inputs: int) -> float:
        """The squared error with so many components, before :meth:`factors` refines the bases."""
        kept = self.energy[outputs - 1, inputs - 1]
        return max(float(self.energy[-1, -1] - kept), 0.0)

    @property
    def size(self) -> float:
        """The square sum of the whole kernel."""
        return float(self.energy[-1, -1])

    def factors(self, outputs: int, inputs: int, rounds: int = 3) -> tuple[Tensor, Tensor, Tensor]:
        """The three weights, float64: (inputs', inputs), the core, (outputs, outputs')."""
        outer, inner = self.bases(outputs, inputs, rounds)
        core = torch.einsum("oiw,op,iq->pqw", self.weighted, outer, inner)
        first = inner.t()
        if self.root is not None:
            first = torch.linalg.solve_triangular(self.root, first, upper=False, left=False)
        return first, core.reshape(outputs, inputs, *self.window), outer

    def bases(self, outputs: int, inputs: int, rounds: int) -> tuple[Tensor, Tensor]:
        """Orthonormal bases of that many components; each round lowers the error or keeps it."""
        outer, inner = self.outer[:, :outputs], self.inner[:, :inputs]
        for _ in range(rounds):
            seen = torch.einsum("oiw,iq->oqw", self.weighted, inner)
            outer = _basis(seen, 0)[:, :outputs]
            seen = torch.einsum("oiw,op->piw", self.weighted, outer)
            inner = _basis(seen, 1)[:, :inputs]
        return outer, inner


def decompose_kernel(weight: Tensor, moment: Tensor | None = None) -> Tucker:
    """Decompose a kernel (outputs, inputs, *window), float64 inside.

    ``moment`` is the second moment of the input channels (inputs, inputs): errors then count by
    what they do to inputs like those, as if neighbouring places were unrelated.
    """
    kernel = weight.double().flatten(2) if weight.dim() > 2 else weight.double()[..., None]
    root = None
    if moment is not None:
        root = moment_root(moment.double())
        kernel = torch.einsum("oiw,ij->ojw", kernel, root)
    outer, inner = _basis(kernel, 0), _basis(kernel, 1)
    core = torch.einsum("oiw,op,iq->pqw", kernel, outer, inner)
    energy = core.square().sum(2).cumsum(0).cumsum(1)
    return Tucker(kernel, tuple(weight.shape[2:]), outer, inner, root, energy)


def _basis(kernel: Tensor, axis: int) -> Tensor:
    """The orthonormal directions along an axis, those with the most of the kernel first."""
    rows = kernel.movedim(axis, 0).flatten(1)
    # Eigenvectors of the small square matrix: the window times the other axis is far longer.
    _, vectors = torch.linalg.eigh(rows @ rows.t())
    return vectors.flip(1)
