"""Weight-only linears: ``mopt::linear_nbits``, and linears over ``mopt::decode_levels``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from mopt.backends.triton.kernel import Kernel, Problem, problem
from mopt.backends.triton.kernels import linear_codes
from mopt.backends.triton.kernels.linear_codes import PackedWeight
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import KernelLayer
from mopt.backends.triton.match import (
    FLOATS,
    LONGEST_GROUP,
    calls,
    constants,
    first,
    is_call,
)
from mopt.backends.triton.planes import pack_blocks, pack_levels
from mopt.backends.triton.rewrite import Left, Lowering, Site, rows_sample
from mopt.backends.triton.values import value_of
from mopt.effects import argument

_aten, _mopt = torch.ops.aten, torch.ops.mopt
LINEAR_CODES = Kernel("linear-codes", linear_codes.space, linear_codes.legal, linear_codes.work)


class CodesLinear(KernelLayer):
    """A linear layer whose weight is codes."""

    kernel = LINEAR_CODES

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias)
        count = linear_codes.counters_needed(weight)
        device = weight.codes.device
        self.register_buffer("counters", torch.zeros(count, dtype=torch.int32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.weight = PackedWeight(
            **{k: fn(v) if isinstance(v, Tensor) else v for k, v in vars(self.weight).items()}
        )
        return super()._apply(fn, recurse)

    def on_meta(self) -> Self:
        twin = super().on_meta()
        twin.weight = self.weight.to("meta")
        return twin

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].numel() // self.weight.columns, inputs[0].dtype

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Tensor:
        """``x @ weight.T + bias`` over the last axis."""
        (x,) = inputs
        flat = x.reshape(-1, self.weight.columns)
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        out = linear_codes.call(run, config, flat, self.weight, self.bias, self.counters)
        return out.reshape(*x.shape[:-1], self.weight.outputs)

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        weight = self.weight
        return problem(
            self.kernel.name, kind=weight.kind, outputs=weight.outputs, columns=weight.columns,
            group=weight.group, units=weight.units, zeros=weight.zeros is not None,
            bias=self.bias is not None, itemsize=dtype.itemsize, rows=rows,
        )  # fmt: skip

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.empty(rows, self.weight.columns, dtype=dtype, device="meta"),)


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, _mopt.linear_nbits.default):
        yield _blocks(module, node)
    for node in calls(module, _aten.linear.default):
        if is_call(node.args[1], _mopt.decode_levels.default):
            yield _levels(module, node)


def _blocks(module: fx.GraphModule, node: fx.Node) -> Site | Left:
    _, *weights, bits, columns, _ = node.args
    tensors = constants(module, weights)
    if tensors is None:
        return Left(node, "the weight is computed, not stored")
    codes, scales, _, _ = tensors
    assert codes is not None and scales is not None
    assert isinstance(bits, int) and isinstance(columns, int)
    group = codes.shape[2] * 8 // bits
    if group > LONGEST_GROUP:
        return Left(node, f"groups of {group} columns, kernels take up to {LONGEST_GROUP}")
    if scales.dtype not in FLOATS:
        return Left(node, f"scales in {scales.dtype}")

    def make(limit: int) -> KernelLayer:
        c, s, z, b = first(tensors, limit)
        assert c is not None and s is not None
        return CodesLinear(pack_blocks(c, s, z, bits, columns), b)

    def reference(limit: int, values: Tensor) -> Tensor:
        operands = first(tensors, limit)
        return _mopt.linear_nbits.default(values, *operands, bits, columns, "float")

    return _site(node, columns, make, reference)


def _levels(module: fx.GraphModule, node: fx.Node) -> Site | Left:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    *stored, kind, scale_kind, columns = weight.args
    tensors = constants(module, (*stored, argument(node, "bias")))
    if tensors is None:
        return Left(node, "the weight is computed, not stored")
    codes, scales, tensor_scale = tensors[0], tensors[1], tensors[3]
    assert codes is not None and scales is not None and isinstance(columns, int)
    group = codes.shape[2] * 8 // {"e4m3": 8, "e5m2": 8}.get(str(kind), 4)
    if codes.shape[1] > 1 and group > LONGEST_GROUP:
        return Left(node, f"groups of {group} columns, kernels take up to {LONGEST_GROUP}")
    rest = (tensor_scale, str(kind), str(scale_kind), columns)

    def make(limit: int) -> KernelLayer:
        c, s, t, _, b = first(tensors, limit)
        assert c is not None and s is not None
        return CodesLinear(pack_levels(c, s, t, *rest), b)

    def reference(limit: int, values: Tensor) -> Tensor:
        c, s, t, _, b = first(tensors, limit)
        decoded = _mopt.decode_levels.default(c, s, t, *rest)
        return torch.nn.functional.linear(values, decoded.to(values.dtype), b)

    covers = (weight,) if len(weight.users) == 1 else ()
    return _site(node, columns, make, reference, covers)


def _site(
    node: fx.Node, columns: int, make: Callable[[int], KernelLayer], reference: Callable[..., Any],
    covers: tuple[fx.Node, ...] = (),
) -> Site | Left:  # fmt: skip
    x = node.args[0]
    value = value_of(x)
    assert isinstance(x, fx.Node) and value is not None
    if value.dtype not in FLOATS:
        return Left(node, f"inputs in {value.dtype}")
    dtype = value.dtype
    return Site(node, (x,), dtype, make, reference, rows_sample(columns, dtype), covers)


LOWERING = Lowering((LINEAR_CODES,), _find)
