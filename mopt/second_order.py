"""Errors of a layer's output by the second moment of its inputs, and the factor that spreads them.

Letters as in Frantar et al. 2022 (GPTQ) and 2023 (SparseGPT): H is the second moment, U the upper
Cholesky factor of its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopt.formats.base import row_pieces

_MOST_DAMPING = 0.1


def output_error(difference: Tensor, moment: Tensor) -> float:
    """tr(D H D^T): the squared error of the outputs per row of inputs."""
    wide, total = moment.double(), 0.0
    for at in row_pieces(difference):
        d = difference[at].double()
        total += float(((d @ wide) * d).sum())
    return total


def inverse_factor(
    h: Tensor, order: Tensor, damping: float, scale: float
) -> tuple[Tensor | None, float | None]:
    """U with inverse(H + damping) = U^T U, columns in ``order``, and the damping it took."""
    tried = damping
    while True:
        # Of these matrices no more than two are held at a time.
        matrix = h[order][:, order]
        matrix.diagonal().add_(tried * scale)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed):
            matrix = torch.cholesky_inverse(matrix)
            matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
            if not bool(failed) and bool(torch.isfinite(matrix).all()):
                return matrix, tried
        if tried >= _MOST_DAMPING:
            return None, None
        tried = min(max(tried * 10, 1e-4), _MOST_DAMPING)
