"""Neighbouring layers between which ranges and biases can be moved, found on the graph."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mopt.effects import argument
from mopt.formats.base import drop_reader
from mopt.layers import LINEAR
from mopt.pass_base import Pass, Skip
from mopt.program import Program, module_path, site_of

_aten = torch.ops.aten
CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)
RELU = (_aten.relu.default, _aten.relu_.default)
_HOMOGENEOUS = (*RELU, _aten.leaky_relu.default)
# Where fold-batch-norm leaves mean and deviation of a layer's output, per channel.
NORMAL = "normal_output"


def find_pairs(program: Program, one: Pass) -> tuple[list[tuple[fx.Node, fx.Node]], list[Skip]]:
    """Layers that follow each other directly or through relu or leaky relu, in graph order."""
    pairs, skipped = [], []
    for node in program.nodes:
        if not _is_layer(program, node) or not one.selects(module_path(node)):
            continue
        value = node
        while len(value.users) == 1 and next(iter(value.users)).target in _HOMOGENEOUS:
            value = next(iter(value.users))
        readers = list(value.users)
        if len(readers) != 1 or not _is_layer(program, readers[0]) or readers[0].args[0] != value:
            if readers and any(user.op != "output" for user in readers):
                name = next(str(u.target) for u in readers if u.op != "output")
                reason = f"its output is read by {name}" + (
                    " and others" if len(readers) > 1 else ""
                )
                skipped.append(Skip(site_of(node), reason))
            continue
        second = readers[0]
        shared = [call for call in (node, second) if _readers(program, call) != 1]
        if shared:
            skipped.append(Skip(site_of(shared[0]), "its weight has other readers"))
        elif one.selects(module_path(second)):
            pairs.append((node, second))
    return pairs, skipped


def groups_of(call: fx.Node) -> int:
    """Groups of a convolution, 1 for a linear layer."""
    return 1 if call.target in LINEAR else int(argument(call, "groups"))


def channel_axis(call: fx.Node) -> int:
    """The axis of a layer's output that its weight's rows make."""
    return -1 if call.target in LINEAR else 1


def replace_argument(program: Program, call: fx.Node, at: int, tensor: Tensor, suffix: str) -> None:
    """Let a call read ``tensor`` instead of the weight or bias (None too) it reads at ``at``."""
    old = call.args[at] if len(call.args) > at else None
    known = program.constant(old)
    path = str(old.target) if isinstance(old, fx.Node) else f"{module_path(call) or call.name}.bias"
    stored = tensor.to(known.dtype if known is not None else call.meta["val"].dtype)
    node = program.add_weight(f"{path}_{suffix}", stored, call)
    if len(call.args) > at:
        call.update_arg(at, node)
    else:
        assert len(call.args) == at
        call.args = (*call.args, node)
    if isinstance(old, fx.Node):
        drop_reader(program, old)


def _is_layer(program: Program, node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (*LINEAR, *CONVOLUTIONS):
        return False
    bias = argument(node, "bias")
    return program.constant(node.args[1]) is not None and (
        bias is None or program.constant(bias) is not None
    )


def _readers(program: Program, call: fx.Node) -> int:
    weight = program.constant(call.args[1])
    assert weight is not None
    return sum(
        len(node.users) for node in program.graph.nodes
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)
        and program.weight(node).untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    )  # fmt: skip
