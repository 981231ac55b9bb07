"""The weight-bearing layers of a graph, with the paths of the user's modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from mopt.flops import node_flops
from mopt.program import Program, module_path, source_line

_aten = torch.ops.aten
_mopt = torch.ops.mopt

LINEAR = (_aten.linear.default,)
CONVOLUTIONS = (
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.conv2d.padding,
    _aten.conv1d.padding, _aten.conv3d.padding, _aten.conv_transpose1d.default,
    _aten.conv_transpose2d.input, _aten.conv_transpose3d.input,
)  # fmt: skip
EMBEDDING = (_aten.embedding.default,)
ATTENTION = (_aten.scaled_dot_product_attention.default,)


@dataclass(frozen=True)
class Layer:
    """One weight and the calls that use it in one role.

    ``kind`` is linear, convolution or embedding; ``shape`` is the weight's; ``flops`` are those of
    all calls on the example inputs; ``source`` is ``file:line`` of the user's code.
    """

    path: str
    kind: str
    calls: tuple[fx.Node, ...]
    weight: fx.Node
    shape: tuple[int, ...]
    flops: int
    source: str


def find_layers(program: Program) -> list[Layer]:
    """Layers in graph order whose weight is a plain tensor; shared calls come together."""
    groups: dict[tuple[str, str], list[fx.Node]] = {}
    for node in program.graph.nodes:
        found = _weight_of(node)
        if found is not None:
            kind, weight = found
            groups.setdefault((kind, str(weight.target)), []).append(node)
    layers = []
    taken: set[str] = set()
    for (kind, target), calls in groups.items():
        found = _weight_of(calls[0])
        assert found is not None
        weight = found[1]
        path = module_path(calls[0]) or target.rpartition(".")[0] or target
        if path in taken:  # two weights in one module: functional layers
            path = f"{path}#{target.rpartition('.')[2]}"
        taken.add(path)
        layers.append(
            Layer(
                path=f"{program.path}.{path}" if program.path else path,
                kind=kind,
                calls=tuple(calls),
                weight=weight,
                shape=tuple(program.weight(weight).shape),
                flops=sum(node_flops(call) for call in calls),
                source=source_line(calls[0]),
            )
        )
    return layers


def is_returned(call: fx.Node) -> bool:
    """Whether the model returns this value: as it is, or in another shape, dtype or scale.

    That is what makes a layer a head: nothing with weights, and no other value, comes after it.
    """
    waiting, seen = [call], {call}
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return True
            if user not in seen and len(user.all_input_nodes) == 1:
                seen.add(user)
                waiting.append(user)
    return False


def _weight_of(node: fx.Node) -> tuple[str, fx.Node] | None:
    if node.op != "call_function":
        return None
    if node.target in LINEAR:
        kind, weight = "linear", node.args[1]
    elif node.target in CONVOLUTIONS:
        kind, weight = "convolution", node.args[1]
    elif node.target in EMBEDDING:
        kind, weight = "embedding", node.args[0]
    else:
        return None
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        return kind, weight
    return None
