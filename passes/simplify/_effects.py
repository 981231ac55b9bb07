"""What an operator does besides computing a value: writing, drawing random numbers, aliasing."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from mopt.program import Program

_COMPOSITE = "CompositeImplicitAutograd"


def is_operator(node: fx.Node) -> bool:
    """Whether a node calls an ATen or custom operator (or picks an element of a result)."""
    return node.op == "call_function" and (
        isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    )


def is_pure(node: fx.Node) -> bool:
    """Whether a node's value depends on nothing but its arguments, and computing it does nothing.

    Graph inputs, weights, the output, calls that write to an argument, random and uninitialised
    values and control flow are not pure.
    """
    if not is_operator(node):
        return False
    if node.target is operator.getitem:
        return True
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name
    return not (
        node.target._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in node.target.tags
        or is_dropout_in_training(node)
        or name.startswith(
            ("aten::_assert", "aten::sym_constrain", "aten::empty", "aten::new_empty")
        )
        or not node.target._schema.returns
    )


def is_dropout_in_training(node: fx.Node) -> bool:
    """Whether a dropout draws random numbers; its operator alone does not say."""
    return bool(
        isinstance(node.target, torch._ops.OpOverload)
        and "dropout" in node.target._schema.name
        and bool_argument(node, "train", default=True)
    )


def bool_argument(node: fx.Node, name: str, *, default: bool) -> bool:
    """A flag of an operator call by the name its schema gives it."""
    value = argument(node, name)
    return default if value is None else bool(value)


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an operator call by the name its schema gives it; its default if not given."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            if parameter.name in node.kwargs:
                return node.kwargs[name]
            return node.args[index] if index < len(node.args) else parameter.default_value
    return None


def written_nodes(program: Program) -> set[fx.Node]:
    """Nodes whose memory some call may write to, directly or through a view.

    A call that may return a view of an argument (by its schema, or because its schema cannot tell,
    as for composite operators) puts result and arguments into one class; a write spoils the class.
    """
    writers = [node for node in program.graph.nodes if _writes(node)]
    if not writers:
        return set()
    parent: dict[fx.Node, fx.Node] = {node: node for node in program.graph.nodes}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    by_storage: dict[Any, fx.Node] = {}
    for node in program.graph.nodes:
        for source in _may_alias(node):
            parent[root(node)] = root(source)
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor):
            first = by_storage.setdefault(program.weight(node).untyped_storage()._cdata, node)
            parent[root(node)] = root(first)
    spoiled = {root(target) for node in writers for target in _written_by(node)}
    return {node for node in program.graph.nodes if root(node) in spoiled}


def _writes(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op not in ("placeholder", "get_attr", "output")
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _written_by(node: fx.Node) -> Iterable[fx.Node]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes
    written: list[fx.Node] = []
    for index, parameter in enumerate(node.target._schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            value = node.kwargs.get(parameter.name)
            if index < len(node.args):
                value = node.args[index]
            fx.map_arg(value, written.append)
    return written


def _may_alias(node: fx.Node) -> list[fx.Node]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes
    annotated = any(result.alias_info is not None for result in node.target._schema.returns)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), _COMPOSITE)
    return node.all_input_nodes if annotated or composite else []
