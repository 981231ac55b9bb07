"""Linears in 8-bit integers whose input is rounded by its range at run time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from mopt.backends.triton.kernels import quantize_tensor
from mopt.backends.triton.launch import Runner
from mopt.backends.triton.layers import KernelLayer
from mopt.backends.triton.lowerings._bytes import LINEAR_BYTES, BytesLinear
from mopt.backends.triton.match import FLOATS, calls, constants, first, with_activation
from mopt.backends.triton.rewrite import Left, Lowering, Site, rows_sample
from mopt.backends.triton.values import value_of

_mopt = torch.ops.mopt


class DynamicInt8Linear(BytesLinear):
    """What ``mopt::linear_dynamic_int8`` computes, one range for the whole input."""

    def quantized(self, run: Runner, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return quantize_tensor.call(run, x)

    def facts(self) -> dict[str, str]:
        return {"input": "dynamic", **super().facts()}


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, _mopt.linear_dynamic_int8.default):
        yield _site(module, node)


def _site(module: fx.GraphModule, node: fx.Node) -> Site | Left:
    x, *weights = node.args
    tensors, value = constants(module, weights), value_of(x)
    assert isinstance(x, fx.Node) and value is not None
    if tensors is None:
        return Left(node, "the weight is computed, not stored")
    if value.dtype not in FLOATS:
        return Left(node, f"inputs in {value.dtype}")
    root, activation = with_activation(node)

    def make(limit: int) -> KernelLayer:
        codes, scales, bias = first(tensors, limit)
        assert codes is not None and scales is not None
        return DynamicInt8Linear(codes, scales, bias, activation)

    def reference(limit: int, values: Tensor) -> Tensor:
        found = _mopt.linear_dynamic_int8.default(values, *first(tensors, limit))
        return found if activation == "none" else getattr(torch.nn.functional, activation)(found)

    assert tensors[0] is not None
    sample = rows_sample(tensors[0].shape[1], value.dtype)
    covers = () if root is node else (node,)
    return Site(root, (x,), value.dtype, make, reference, sample, covers)


LOWERING = Lowering((LINEAR_BYTES,), _find)
