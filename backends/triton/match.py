"""Questions about a graph that patterns ask: stored tensors, sole readers, activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mopt.effects import argument

_aten = torch.ops.aten
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# A tile along K must hold a whole group; longer ones would not fit the chip's registers.
LONGEST_GROUP = 128


def calls(module: fx.GraphModule, *targets: Any) -> Iterator[fx.Node]:
    """The calls of these operators, in order."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in targets:
            yield node


def is_call(node: Any, *targets: Any) -> bool:
    """Whether an argument is the result of one of these operators."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def constant(module: fx.GraphModule, value: Any) -> Tensor | None:
    """The tensor behind a node that reads a weight, None for anything else."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    owner: Any = module
    for part in str(value.target).split("."):
        owner = getattr(owner, part)
    return owner if isinstance(owner, Tensor) else None


def constants(module: fx.GraphModule, values: Sequence[Any]) -> list[Tensor | None] | None:
    """The tensors behind arguments that are weights or None; None where one is computed."""
    found = [constant(module, value) for value in values]
    computed = any(isinstance(v, fx.Node) and f is None
                   for v, f in zip(values, found, strict=True))  # fmt: skip
    return None if computed else found


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads a value, None where there are more or it is returned."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    return None if reader.op == "output" else reader


def activation_of(node: fx.Node) -> str | None:
    """The name of an activation that kernels compute behind a product, None for other calls."""
    if is_call(node, _aten.relu.default):
        return "relu"
    if is_call(node, _aten.silu.default):
        return "silu"
    if is_call(node, _aten.gelu.default) and argument(node, "approximate") == "none":
        return "gelu"
    return None


def with_activation(node: fx.Node) -> tuple[fx.Node, str]:
    """(what a product with its activation gives, the activation's name or "none")."""
    reader = only_reader(node)
    name = activation_of(reader) if reader is not None else None
    return (reader, name) if reader is not None and name else (node, "none")


def first(tensors: Sequence[Tensor | None], limit: int) -> list[Tensor | None]:
    """The first ``limit`` rows of tensors that have one for every output; scalars as they are."""
    return [t[:limit] if limit and t is not None and t.dim() else t for t in tensors]


def linear_parts(module: fx.GraphModule, node: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer whose weights are stored floats, None for others."""
    if not is_call(node, _aten.linear.default):
        return None
    found = constants(module, (node.args[1], argument(node, "bias")))
    if found is None or found[0] is None or found[0].dtype not in FLOATS:
        return None
    return found[0], found[1]
