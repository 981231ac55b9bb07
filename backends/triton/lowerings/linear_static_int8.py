"""Linears between quantize and dequantize: 8-bit products with ranges known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from mopt.backends.triton.launch import Runner
from mopt.backends.triton.layers import KernelLayer
from mopt.backends.triton.lowerings._bytes import LINEAR_BYTES, BytesLinear
from mopt.backends.triton.match import (
    FLOATS,
    calls,
    constant,
    constants,
    first,
    is_call,
    with_activation,
)
from mopt.backends.triton.rewrite import Left, Lowering, Site
from mopt.backends.triton.values import value_of
from mopt.effects import argument

_aten, _mopt = torch.ops.aten, torch.ops.mopt
_CODES = (torch.uint8, torch.int8)


class StaticInt8Linear(BytesLinear):
    """A linear layer whose input is codes already, uint8 or int8."""

    def __init__(
        self, codes: Tensor, scales: Tensor, bias: Tensor | None, activation: str, scale: Tensor,
        zero: Tensor, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__(codes, scales, bias, activation)
        self.dtype, self.input_type = dtype, zero.dtype
        # The kernel takes 128 from codes without a sign, and so is it taken here.
        middle = 128 if zero.dtype == torch.uint8 else 0
        self.register_buffer("scale", scale.float().reshape(1))
        self.register_buffer("zero", zero.to(torch.int32).reshape(1) - middle)

    def quantized(self, run: Runner, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, self.scale, self.zero

    def output_type(self, x: Tensor) -> torch.dtype:
        return self.dtype

    def facts(self) -> dict[str, Any]:
        return {"input": str(self.input_type)[6:], **super().facts()}

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.empty(rows, self.columns, dtype=self.input_type, device="meta"),)


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, _aten.linear.default):
        x, weight = node.args[:2]
        both = (is_call(v, _mopt.dequantize.default) for v in (x, weight))
        if all(both) and constant(module, weight.args[0]) is not None:  # type: ignore[union-attr]
            yield _site(module, node)


def _site(module: fx.GraphModule, node: fx.Node) -> Site | Left:
    x, weight, bias = node.args[0], node.args[1], argument(node, "bias")
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    source = x.args[0]
    code_value, output = value_of(source), value_of(node)
    assert isinstance(source, fx.Node) and output is not None
    stored = constants(module, (*x.args[1:3], *weight.args[:3]))
    if stored is None or code_value is None or code_value.dtype not in _CODES:
        return Left(node, "scales are computed, or codes are not in 8 bits")
    scale, zero, codes, scales, zeros = stored
    assert scale is not None and zero is not None and codes is not None
    assert scales is not None and zeros is not None
    if scale.numel() != 1 or codes.dtype != torch.int8 or bool(zeros.any()):
        return Left(node, "kernels take one scale for the input and weights without zero point")
    if output.dtype not in FLOATS or code_value.dim() < 2:
        return Left(node, f"outputs in {output.dtype}")
    if scales.numel() == 1:
        scales = scales.reshape(1).expand(codes.shape[0])
    found, added = _bias(module, bias)
    if not found:
        return Left(node, "the bias is computed, not stored")
    root, activation = with_activation(node)
    dtype, middle = output.dtype, 128 if zero.dtype == torch.uint8 else 0
    columns = codes.shape[1]
    tensors: list[Tensor | None] = [codes, scales, added]

    def make(limit: int) -> KernelLayer:
        c, s, b = first(tensors, limit)
        assert c is not None and s is not None
        return StaticInt8Linear(c, s, b, activation, scale, zero, dtype)

    def reference(limit: int, values: Tensor) -> Tensor:
        c, s, b = first(tensors, limit)
        assert c is not None and s is not None
        wide = _mopt.dequantize.default(values, scale, zero, 0)
        dense = (c.to(s.dtype) * s[:, None]).to(wide.dtype)
        result = torch.nn.functional.linear(wide, dense, b)
        return result if activation == "none" else getattr(torch.nn.functional, activation)(result)

    def sample(generator: torch.Generator) -> tuple[Tensor, ...]:
        values = torch.randint(0, 256, (3, columns), generator=generator) - (128 - middle)
        return (values.to(zero.dtype),)

    inside = (*(() if root is node else (node,)), x, weight)
    covers = tuple(one for one in inside if len(one.users) == 1)
    return Site(root, (source,), dtype, make, reference, sample, covers)


def _bias(module: fx.GraphModule, bias: Any) -> tuple[bool, Tensor | None]:
    """(whether it is known, the bias), also where it is stored as codes."""
    if bias is None:
        return True, None
    if not is_call(bias, _mopt.dequantize.default):
        found = constant(module, bias)
        return found is not None, found
    stored = constants(module, bias.args[:3])
    if stored is None or any(tensor is None for tensor in stored):
        return False, None
    return True, _mopt.dequantize.default(*stored, bias.args[3])


LOWERING = Lowering((LINEAR_BYTES,), _find)
