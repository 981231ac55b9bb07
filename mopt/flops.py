"""Floating-point operations of one graph node, from the shapes in its metadata.

A multiply and an add count as two. Element-wise work counts one operation per output element; moves
of data count none. Symbolic sizes are replaced by the sizes of the example inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import fx

_FREE = {
    "view", "reshape", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "slice",
    "select", "split", "split_with_sizes", "chunk", "cat", "stack", "clone", "contiguous", "detach",
    "alias", "embedding", "gather", "index_select", "index", "arange", "full", "zeros", "ones",
    "empty", "to", "_to_copy", "dropout", "flatten", "unflatten", "type_as", "unbind", "pad",
    "full_like", "zeros_like", "ones_like", "new_ones", "new_zeros", "lift_fresh_copy", "movedim",
    "repeat", "tril", "triu", "sym_size", "size", "embedding_int8", "widen", "copy_", "narrow",
}  # fmt: skip


class ModelSize(NamedTuple):
    """What a layer is small or large against: bytes of weights, FLOPs on the example inputs."""

    bytes: int
    flops: int


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a node's value as plain integers (symbols take their example size)."""
    return tuple(size_hint(size) for size in value.shape)


def size_hint(size: int | torch.SymInt) -> int:
    """A plain integer for a size: itself, or what its symbol was in the example inputs.

    A size that depends on the data, such as a count of non-zeros, is not known: it counts as 1.
    """
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    return [
        shape_of(arg.meta["val"])
        for arg in node.all_input_nodes
        if isinstance(arg.meta.get("val"), torch.Tensor)
    ]


def _value_shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        value = next((item for item in value if isinstance(item, torch.Tensor)), None)
    return shape_of(value) if isinstance(value, torch.Tensor) else ()


def _argument_shape(node: fx.Node, index: int) -> tuple[int, ...]:
    argument = node.args[index]
    assert isinstance(argument, fx.Node)
    return shape_of(argument.meta["val"])


def _linear(node: fx.Node) -> int:
    return 2 * prod(_value_shape(node)) * _argument_shape(node, 0)[-1]


def _conv(node: fx.Node) -> int:
    weight = _argument_shape(node, 1)
    if node.target in (
        torch.ops.aten.conv_transpose1d.default,
        torch.ops.aten.conv_transpose2d.input,
        torch.ops.aten.conv_transpose3d.input,
    ):
        return 2 * prod(_argument_shape(node, 0)) * prod(weight[1:])
    return 2 * prod(_value_shape(node)) * prod(weight[1:])


def _matmul(node: fx.Node) -> int:
    left = _argument_shape(node, 1 if node.target is torch.ops.aten.baddbmm.default else 0)
    return 2 * prod(_value_shape(node)) * left[-1]


def _addmm(node: fx.Node) -> int:
    return 2 * prod(_value_shape(node)) * _argument_shape(node, 1)[-1]


def _attention(node: fx.Node) -> int:
    *batch, queries, width = _argument_shape(node, 0)
    keys = _argument_shape(node, 1)[-2]
    return 2 * prod(batch) * queries * keys * (width + _argument_shape(node, 2)[-1])


def _recurrent(gates: int) -> Callable[[fx.Node], int]:
    def count(node: fx.Node) -> int:
        weights = [s for s in _shapes(node) if len(s) == 2]
        steps = prod(_argument_shape(node, 0)[:2])
        return 2 * steps * sum(prod(w) for w in weights)

    return count


_RULES: dict[str, Callable[[fx.Node], int]] = {
    "linear": _linear,
    "linear_nbits": _linear,
    "linear_dynamic_int8": _linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "convolution": _conv,
    "conv_transpose1d": _conv,
    "conv_transpose2d": _conv,
    "conv_transpose3d": _conv,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "baddbmm": _matmul,
    "addmm": _addmm,
    "scaled_dot_product_attention": _attention,
    "lstm": _recurrent(4),
    "gru": _recurrent(3),
}


def node_flops(node: fx.Node) -> int:
    """FLOPs of one node for the example shapes; 0 for data movement and non-calls."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 0
    name = node.target._schema.name.split("::")[1]
    if name in _FREE:
        return 0
    rule = _RULES.get(name)
    return rule(node) if rule else prod(_value_shape(node)) if _value_shape(node) else 0
