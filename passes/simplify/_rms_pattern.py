"""RMS norm written out in elementary operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mopt.effects import argument
from mopt.program import Program

_aten = torch.ops.aten
_CASTS = (_aten.to.dtype, _aten.to.dtype_layout, _aten._to_copy.default, _aten.type_as.default)


def rms_scale(program: Program, node: fx.Node) -> Tensor | None:
    """Gamma (one axis) if a node computes ``gamma * x * rsqrt(mean(x^2) + eps)``, else None.

    The casts around the normalisation that keep it in float32 may be there or not. The product
    must have the dtype of the normalised value, so that it can be left out.
    """
    if node.target is not _aten.mul.Tensor:
        return None
    for gamma_argument, value in (node.args, node.args[::-1]):
        gamma = program.constant(gamma_argument)
        if gamma is None or gamma.dim() != 1 or not isinstance(value, fx.Node):
            continue
        same = value.meta["val"].dtype == node.meta["val"].dtype
        if same and value.meta["val"].shape[-1] == gamma.shape[0] and _is_normalised(value):
            return gamma
    return None


def _is_normalised(node: fx.Node) -> bool:
    """Whether a node is x * rsqrt(mean(x^2, last axis) + eps)."""
    node = _through_casts(node)
    if node.target is not _aten.mul.Tensor:
        return False
    for x, factor in (node.args, node.args[::-1]):
        if isinstance(x, fx.Node) and isinstance(factor, fx.Node) and _is_inverse_rms(factor, x):
            return True
    return False


def _is_inverse_rms(factor: fx.Node, x: fx.Node) -> bool:
    if factor.target is not _aten.rsqrt.default:
        return False
    total = factor.args[0]
    if not isinstance(total, fx.Node) or total.target not in (_aten.add.Tensor, _aten.add.Scalar):
        return False
    mean, eps = total.args[:2]
    if not isinstance(eps, int | float) or not isinstance(mean, fx.Node):
        return False
    if mean.target is not _aten.mean.dim or not argument(mean, "keepdim"):
        return False
    axes, square = argument(mean, "dim"), mean.args[0]
    if not isinstance(square, fx.Node) or list(axes) not in ([-1], [x.meta["val"].dim() - 1]):
        return False
    return _squared(square) is _through_casts(x) or _squared(square) is x


def _squared(node: fx.Node) -> Any:
    """What a node is the square of."""
    if node.target is _aten.pow.Tensor_Scalar and node.args[1] == 2:
        return node.args[0]
    if node.target is _aten.square.default:
        return node.args[0]
    if node.target is _aten.mul.Tensor and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _through_casts(node: fx.Node) -> fx.Node:
    while node.target in _CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
