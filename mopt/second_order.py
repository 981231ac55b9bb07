"""Errors of a layer's output by the second moment of its inputs, and the factor that spreads them.

Letters as in Frantar et al. 2022 (GPTQ) and 2023 (SparseGPT): H is the second moment, U the upper
Cholesky factor of its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopt.formats.base import row_pieces

_MOST_DAMPING = 0.1
# Columns of a moment that are widened to float64 at a time.
_COLUMNS = 256


def times_moment(rows: Tensor, moment: Tensor) -> Tensor:
    """``rows`` (n, K) times a moment (K, K) in float64, of which there is never a whole copy."""
    wide = rows.double()
    if moment.dtype == torch.float64:
        return wide @ moment
    result = torch.empty_like(wide)
    for start in range(0, len(moment), _COLUMNS):
        at = slice(start, start + _COLUMNS)
        result[:, at] = wide @ moment[:, at].double()
    return result


def row_errors(difference: Tensor, moment: Tensor) -> Tensor:
    """d H d^T of each row d (n), float64."""
    return times_moment(difference, moment).mul_(difference).sum(1)


def output_error(difference: Tensor, moment: Tensor) -> float:
    """tr(D H D^T): the squared error of the outputs per row of inputs."""
    return sum(float(row_errors(difference[at], moment).sum()) for at in row_pieces(difference))


def inverse_factor(
    h: Tensor, order: Tensor, damping: float, scale: float
) -> tuple[Tensor | None, float | None]:
    """U with inverse(H + damping) = U^T U, float64, columns in ``order``; and the damping it took.

    One matrix of float64 is held beside ``h``.
    """
    tried = damping
    while True:
        # A symmetric matrix by columns is what LAPACK factors and inverts in place.
        matrix = torch.empty(h.shape, dtype=torch.float64, device=h.device).t()
        for start in range(0, len(h), _COLUMNS):
            at = slice(start, start + _COLUMNS)
            matrix[:, at] = h[order[at, None], order].t()
        failed = torch.empty((), dtype=torch.int32, device=h.device)
        matrix.diagonal().add_(tried * scale)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not bool(failed):
            torch.cholesky_inverse(matrix, out=matrix)
            torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, failed))
            if not bool(failed) and bool(torch.isfinite(matrix).all()):
                return matrix, tried
        if tried >= _MOST_DAMPING:
            return None, None
        tried = min(max(tried * 10, 1e-4), _MOST_DAMPING)


def solve_in_place(h: Tensor, right: Tensor) -> bool:
    """Put R H^-1 in the place of ``right`` (n, K) for a positive definite ``h`` (K, K) float64.

    ``h`` is used up: its factor takes its place. False, and ``right`` as it was, where it has none.
    """
    factor = h.t()
    failed = torch.empty((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    if bool(failed):
        return False
    for start in range(0, len(right), _COLUMNS):
        at = slice(start, start + _COLUMNS)
        right[at] = torch.cholesky_solve(right[at].double().t(), factor).t().to(right.dtype)
    return True
