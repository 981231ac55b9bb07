"""What an operator does besides computing a value: writing, drawing random numbers, aliasing."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from mopt.program import Program

_SIZE_ARITHMETIC = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv,
    operator.truediv, operator.mod, operator.neg, operator.pow, operator.eq, operator.ne,
    operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_,
    torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_int, torch.sym_float, torch.sym_ite,
}  # fmt: skip
# Composite operators that always return new memory, though no schema says so.
_FRESH_COMPOSITES = {
    "linear", "matmul", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm",
    "instance_norm", "batch_norm", "scaled_dot_product_attention", "max_pool1d", "max_pool2d",
    "max_pool3d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool1d", "relu6", "selu", "silu", "outer", "one_hot",
    "square", "cosine_similarity", "floor_divide", "pixel_shuffle", "log_sigmoid", "argsort",
    "embedding_bag", "nll_loss", "cross_entropy_loss", "linalg_norm", "linalg_vector_norm",
    "std", "var", "upsample_nearest2d", "upsample_bilinear2d", "all", "any", "lstm", "gru",
    "sym_size",
}  # fmt: skip

_UNSAFE_VIEWS = {"_unsafe_view", "unsafe_split", "unsafe_split_with_sizes"}


def is_pure(node: fx.Node) -> bool:
    """Whether a node's value depends on nothing but its arguments, and computing it does nothing.

    Graph inputs, weights, the output, calls that write to an argument, random and uninitialised
    values, assertions and control flow are not pure.
    """
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target in _SIZE_ARITHMETIC
    schema = node.target._schema
    uninitialised = schema.name.startswith(("aten::empty", "aten::new_empty"))
    return bool(schema.returns) and not (schema.is_mutable or _is_random(node) or uninitialised)


def _is_random(node: fx.Node) -> bool:
    """Operators with a dropout in them are random only while it is on."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    return not (argument(node, "train") is False or argument(node, "dropout_p") == 0.0)


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an operator call by the name in its schema: its default if not given.

    None if the operator has no such argument.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[index] if index < len(node.args) else parameter.default_value
    return None


def may_alias(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the value of a node may share.

    By the operator's schema, or, where a schema cannot tell (composite operators), all of them.
    """
    if node.op != "call_function":
        return list(node.all_input_nodes) if node.op in ("call_module", "call_method") else []
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.all_input_nodes)
    schema = node.target._schema
    if any(result.alias_info is not None for result in schema.returns):
        return [node for node in node.all_input_nodes if _is_tensor(node)]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        node.target.name(), "CompositeImplicitAutograd"
    )
    name = schema.name.removeprefix("aten::")
    fresh = name in _FRESH_COMPOSITES or (not composite and name not in _UNSAFE_VIEWS)
    return [] if fresh else [node for node in node.all_input_nodes if _is_tensor(node)]


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), int | float | bool | torch.SymInt | torch.SymFloat)


def memory_behind(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes whose memory the values of ``nodes`` may share, themselves included."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(may_alias(node))
    return found


def returned_nodes(program: Program) -> set[fx.Node]:
    """The nodes whose memory the caller may get to see, and write to, as an output."""
    outputs = [node for node in program.graph.nodes if node.op == "output"]
    return memory_behind(source for node in outputs for source in node.all_input_nodes)


def memory_roots(program: Program) -> dict[fx.Node, fx.Node]:
    """For every node one that stands for all memory it may share, directly or through others."""
    parent: dict[fx.Node, fx.Node] = {node: node for node in program.graph.nodes}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    by_storage: dict[Any, fx.Node] = {}
    for node in program.graph.nodes:
        for source in may_alias(node):
            parent[root(node)] = root(source)
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor):
            first = by_storage.setdefault(program.weight(node).untyped_storage()._cdata, node)
            parent[root(node)] = root(first)
    return {node: root(node) for node in program.graph.nodes}


def written_nodes(program: Program) -> set[fx.Node]:
    """The nodes whose memory some call of the graph may write to, directly or through a view."""
    writers = [node for node in program.graph.nodes if may_write(node)]
    if not writers:
        return set()
    root = memory_roots(program)
    spoiled = {root[target] for node in writers for target in written_by(node)}
    return {node for node in program.graph.nodes if root[node] in spoiled}


def may_write(node: fx.Node) -> bool:
    """Whether a call may write to memory of its arguments, by its schema or for want of one."""
    if node.op in ("call_module", "call_method"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call may write to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.all_input_nodes)
    written: list[fx.Node] = []
    for parameter in node.target._schema.arguments:
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            fx.map_arg(argument(node, parameter.name), written.append)
    return written
