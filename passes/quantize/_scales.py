"""Edges whose channels can be rescaled without changing the function, and doing so.

An edge is a value that linear layers read. Its channels are divided by positive factors where they
are made (the affine part of a norm, or the rows of a linear layer before it) or by a multiplication
of its own in front of those layers, and the columns of the layers are multiplied by the same
factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mopt.effects import argument
from mopt.formats.base import drop_reader, row_pieces
from mopt.layers import LINEAR, find_layers
from mopt.machine import trim_heap
from mopt.pass_base import Skip
from mopt.passes.quantize._calibrated import Group, input_groups
from mopt.program import Program, module_path

_aten = torch.ops.aten
_NORMS = (_aten.layer_norm.default, _aten.rms_norm.default)
_RESHAPES = (
    _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default,
    _aten.flatten.using_ints, _aten.unflatten.int, _aten.contiguous.default, _aten.clone.default,
)  # fmt: skip
_HOMOGENEOUS = (_aten.relu.default, _aten.relu_.default)
_ATTENTION = _aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Edge:
    """A value with the ``group`` of its readers; ``maker`` takes the inverse factors.

    Without a maker the inverse factors become a multiplication in front of the readers.
    """

    group: Group
    maker: fx.Node | None

    @property
    def path(self) -> str:
        """The readers' paths, for reports."""
        return ",".join(layer.path for layer in self.group.layers)


def find_edges_to_scale(
    program: Program, selects: Callable[[str], bool], *, insert: bool = False
) -> tuple[list[Edge], list[Skip]]:
    """Every edge whose readers are all linear layers and whose maker can take factors.

    ``selects`` says whether a layer's path is wanted. ``insert`` adds the edges without such a
    maker. Sites that cannot be scaled are skipped with the operator that stands in the way.
    """
    edges, skipped = [], []
    linears = [layer for layer in find_layers(program) if layer.kind == "linear"]
    for group in input_groups(linears):
        if not all(selects(layer.path) for layer in group.layers):
            continue
        found = _maker(program, group)
        if isinstance(found, str) and insert and _can_insert(program, group):
            edges.append(Edge(group, None))
        elif isinstance(found, str):
            skipped.append(Skip(group.layers[0].path, found))
        else:
            edges.append(Edge(group, found))
    return edges, skipped


def scale_edge(program: Program, edge: Edge, factors: Tensor) -> None:
    """Divide the edge's channels by ``factors`` (K) where they are made, multiply the columns."""
    s = factors.double()
    for layer in edge.group.layers:
        set_weight(program, layer.calls[0], lambda weight: weight * s)
    maker = edge.maker
    if maker is None:
        _insert_product(program, edge, 1 / s)
        return
    if maker.target in LINEAR:
        _set(program, maker, 1, program.weight(_reader(maker, 1)).double() / s[:, None])
        if len(maker.args) > 2 and maker.args[2] is not None:
            _set(program, maker, 2, program.weight(_reader(maker, 2)).double() / s)
        return
    if maker.target in _NORMS:
        for at in range(2, 4 if maker.target is _NORMS[0] else 3):
            _set(program, maker, at, program.weight(_reader(maker, at)).double() / s)
        return
    at = 0 if program.constant(maker.args[0]) is not None else 1
    _set(program, maker, at, program.weight(_reader(maker, at)).double() / s)


def first_reader(program: Program, group: Group) -> fx.Node:
    """The first of the calls that read a group's value."""
    calls = {layer.calls[0] for layer in group.layers}
    return next(node for node in program.graph.nodes if node in calls)


def set_weight(program: Program, call: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
    """Let a linear call read ``change`` of its weight, computed in float64, some rows at a time."""
    weight = program.weight(_reader(call, 1))
    changed = torch.empty_like(weight)
    for at in row_pieces(weight):
        changed[at] = change(weight[at].double()).to(weight.dtype)
    _set(program, call, 1, changed)


def _insert_product(program: Program, edge: Edge, factors: Tensor) -> None:
    """Let the readers of an edge read it times ``factors``, computed once before the first."""
    value = edge.group.inputs[0]
    first = first_reader(program, edge.group)
    stored = program.add_weight(
        f"{value.name}_factors", factors.to(value.meta["val"].dtype), before=first
    )
    product = program.insert_call(_aten.mul.Tensor, (value, stored), like=first)
    for layer in edge.group.layers:
        layer.calls[0].update_arg(0, product)


def _can_insert(program: Program, group: Group) -> bool:
    return len(group.inputs) == 1 and not any(
        _is_shared(program, layer.weight) for layer in group.layers
    )


def _reader(call: fx.Node, at: int) -> fx.Node:
    node = call.args[at]
    assert isinstance(node, fx.Node)
    return node


def _set(program: Program, call: fx.Node, at: int, tensor: Tensor) -> None:
    old = _reader(call, at)
    path = str(old.target).removesuffix("_scaled")
    new = program.add_weight(f"{path}_scaled", tensor.to(program.weight(old).dtype), call)
    call.update_arg(at, new)
    drop_reader(program, old)
    trim_heap()


def _maker(program: Program, group: Group) -> fx.Node | str:
    """The node that can take the inverse factors of what a group reads, or what forbids it."""
    if len(group.inputs) != 1:
        return "it is called several times, on values of different makers"
    value = group.inputs[0]
    calls = {layer.calls[0] for layer in group.layers}
    others = [user for user in value.users if user not in calls]
    if others:
        return f"{_name(others[0])} also reads its input"
    for layer in group.layers:
        if _is_shared(program, layer.weight):
            return f"the weight of {layer.path!r} has other readers"
    width = group.layers[0].shape[1]
    found = _walk(program, value, width)
    if isinstance(found, str):
        return found
    for at in range(1, len(found.args)):
        reader = found.args[at]
        if program.constant(reader) is not None and _is_shared(program, _arg(found, at)):
            return f"the weight of {_name(found)} before it has other readers"
    return found


def _walk(program: Program, node: fx.Node, width: int) -> fx.Node | str:
    """Upwards to what makes the channels, through operators that keep or only scale them."""
    if node.op != "call_function":
        return "its input is an input of the model"
    if node.target in _NORMS:
        ends = 4 if node.target is _NORMS[0] else 3
        parameters = [argument(node, name) for name in ("weight", "bias")[: ends - 2]]
        if any(program.constant(value) is None for value in parameters):
            return "the norm before it has no weight or no bias to take the factors"
        if len(argument(node, "normalized_shape")) != 1 or len(node.args) < ends:
            return "the norm before it works on several axes"
        return node
    if node.target in LINEAR:
        constants = [program.constant(value) for value in node.args[1:] if value is not None]
        return node if all(c is not None for c in constants) else "a weight before it is computed"
    if node.target is _aten.mul.Tensor:
        return _walk_product(program, node, width)
    if node.target in _HOMOGENEOUS and len(_arg(node, 0).users) == 1:
        return _walk(program, _arg(node, 0), width)
    if node.target in _RESHAPES:
        return _walk_heads(program, node, width)
    return f"{_name(node)} before it does not let factors through"


def _walk_product(program: Program, node: fx.Node, width: int) -> fx.Node | str:
    """A constant per channel (gamma of a norm written out), or the linear operand of a gate."""
    for side in (0, 1):
        constant = program.constant(node.args[side])
        if constant is not None and constant.shape == (width,):
            reader = _arg(node, side)
            return "its gamma has other readers" if _is_shared(program, reader) else node
    for side in (0, 1):
        operand = node.args[side]
        if isinstance(operand, fx.Node) and operand.target in LINEAR and len(operand.users) == 1:
            return _walk(program, operand, width)
    return "neither factor of the product before it is a linear layer of its own"


def _walk_heads(program: Program, node: fx.Node, width: int) -> fx.Node | str:
    """From merged heads back through attention to the layer that makes the values."""
    blocked = f"{_name(node)} before it may mix channels"
    merged = _above(node, _RESHAPES)
    if merged is None or not _swaps_heads(merged):
        return blocked
    attention = _arg(merged, 0)
    if attention.target is not _ATTENTION or len(attention.users) != 1:
        return blocked
    values = _arg(attention, 2)
    heads, size = values.meta["val"].shape[1], values.meta["val"].shape[3]
    if values.meta["val"].dim() != 4 or heads * size != width:
        return "its values are shared between heads"
    if not _swaps_heads(values) or len(values.users) != 1 or len(_arg(values, 0).users) != 1:
        return blocked
    source = _above(_arg(values, 0), _RESHAPES)
    if source is None or source.target not in LINEAR:
        return blocked
    return _walk(program, source, width)


def _above(node: fx.Node, targets: tuple[object, ...]) -> fx.Node | None:
    """The first node above ``node`` that is none of ``targets``, if each has one reader."""
    while node.op == "call_function" and node.target in targets:
        node = _arg(node, 0)
        if len(node.users) != 1:
            return None
    return node


def _swaps_heads(node: fx.Node) -> bool:
    if node.target is not _aten.transpose.int or node.meta["val"].dim() != 4:
        return False
    return {axis % 4 for axis in (_number(node, 1), _number(node, 2))} == {1, 2}


def _number(node: fx.Node, at: int) -> int:
    found = node.args[at]
    assert isinstance(found, int)
    return found


def _arg(node: fx.Node, at: int) -> fx.Node:
    found = node.args[at]
    assert isinstance(found, fx.Node)
    return found


def _is_shared(program: Program, reader: fx.Node) -> bool:
    """Whether a weight's memory is read more than once, under whatever name."""
    memory = program.weight(reader).untyped_storage().data_ptr()
    readers = [
        node for node in program.graph.nodes
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)
    ]  # fmt: skip
    same = [node for node in readers if program.weight(node).untyped_storage().data_ptr() == memory]
    return sum(len(node.users) for node in same) > 1


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "an output of the model"
    return module_path(node) or str(node.target)
