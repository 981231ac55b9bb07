"""Errors of a layer's output by the second moment of its inputs, and the factor that spreads them.

Letters as in Frantar et al. 2022 (GPTQ) and 2023 (SparseGPT): H is the second moment, U the upper
Cholesky factor of its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_DAMPING = 0.1


def output_error(difference: Tensor, moment: Tensor) -> float:
    """tr(D H D^T): the squared error of the outputs per row of inputs."""
    d = difference.double()
    return float(((d @ moment.double()) * d).sum())


def inverse_factor(
    h: Tensor, order: Tensor, damping: float, scale: float
) -> tuple[Tensor | None, float | None]:
    """U with inverse(H + damping) = U^T U, columns in ``order``, and the damping it took."""
    ordered = h[order][:, order]
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    tried = damping
    while True:
        lower, failed = torch.linalg.cholesky_ex(ordered + tried * scale * identity)
        if not bool(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed) and bool(torch.isfinite(upper).all()):
                return upper, tried
        if tried >= _MOST_DAMPING:
            return None, None
        tried = min(max(tried * 10, 1e-4), _MOST_DAMPING)
