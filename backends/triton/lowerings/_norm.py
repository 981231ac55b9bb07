"""Norms of a graph, RMS or layer norm over the last axis, as kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mopt.backends.triton.match import FLOATS, constants
from mopt.backends.triton.values import value_of
from mopt.effects import argument

_aten = torch.ops.aten
RMS_NORM, LAYER_NORM = _aten.rms_norm.default, _aten.layer_norm.default


@dataclass(frozen=True)
class Norm:
    """A norm: ``x`` is what it reads, ``weight`` and ``bias`` are stored or None."""

    x: fx.Node
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centered: bool
    width: int
    dtype: torch.dtype

    def apply(self, x: Tensor) -> Tensor:
        """The operator itself."""
        if self.centered:
            return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


def read_norm(module: fx.GraphModule, node: fx.Node) -> Norm | None:
    """What a norm's call says; None where it is over more axes or its weights are computed."""
    centered = node.target == LAYER_NORM
    x, shape = node.args[:2]
    value = value_of(x)
    affine = (argument(node, "weight"), argument(node, "bias") if centered else None)
    stored = constants(module, affine)
    if stored is None or value is None or value.dtype not in FLOATS or len(shape) != 1:  # type: ignore[arg-type]
        return None
    if not isinstance(x, fx.Node) or not isinstance(value.shape[-1], int):
        return None
    eps = argument(node, "eps")
    if eps is None:
        eps = torch.finfo(value.dtype).eps
    assert isinstance(eps, float)
    return Norm(x, stored[0], stored[1], eps, centered, value.shape[-1], value.dtype)
