"""Shapes of all values of a graph, derived again only where something changed.

A value's shape follows from the operator, its arguments and the shapes of its inputs. Each node
keeps what its shape was derived from, so that an edit costs the edited nodes and those whose inputs
look different now; with symbolic sizes a full derivation takes seconds.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

_ORIGIN = "mopt_shape_origin"


def derive_shapes(module: fx.GraphModule) -> None:
    """Fill in ``node.meta["val"]`` of every node; raises what an operator's shape rule raises."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("val") for node in inputs]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    # Without PyTorch's own Python forms, operators made of others (LSTM, upsampling of volumes)
    # read symbolic sizes as numbers: they fail, or fix the sizes to the example's.
    with enable_python_dispatcher():
        _Derivation(module, mode).propagate_dont_convert_inputs(*values)


def trust_shapes(module: fx.GraphModule) -> None:
    """Take the shapes of a graph that was traced just now as derived."""
    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta[_ORIGIN] = _origin(module, node)


class _Derivation(FakeTensorProp):
    def run_node(self, n: fx.Node) -> Any:
        origin = _origin(self.module, n)
        # A pass may have copied everything but the value from another node.
        if origin is not None and n.meta.get(_ORIGIN) == origin and "val" in n.meta:
            return n.meta["val"]
        value = super().run_node(n)
        n.meta[_ORIGIN] = origin
        return value


def _origin(module: torch.nn.Module, node: fx.Node) -> tuple[Any, ...] | None:
    """What decides the shape of a node, whatever its inputs are called; None if unknown."""
    if node.op == "get_attr":
        weight = attrgetter(str(node.target))(module)
        return (node.target, _description(weight)) if isinstance(weight, Tensor) else None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    inputs: list[Any] = []

    def described(source: fx.Node) -> str:
        inputs.append(_description(source.meta.get("val")))
        return "%"

    args, kwargs = map_arg((node.args, dict(node.kwargs)), described)
    return (str(node.target), repr(args), repr(kwargs), tuple(inputs))


def _description(value: Any) -> Any:
    if isinstance(value, Tensor):
        sizes = tuple(_size(size) for size in (*value.shape, *value.stride()))
        return (value.dtype, value.device, sizes)
    if isinstance(value, list | tuple):
        return tuple(_description(item) for item in value)
    return _size(value)


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat) else size
