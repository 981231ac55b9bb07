"""Stretches of a graph whose layers are trained together: finding them and running them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.layers import Layer
from mopt.program import Program, module_path


@dataclass(frozen=True)
class Block:
    """Neighbouring nodes with all calls of ``layers`` among them.

    ``inputs`` are the values made before that they read, ``outputs`` the floating-point values
    that are read behind them.
    """

    path: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]


def find_blocks(program: Program, layers: list[Layer], *, whole: bool) -> list[Block]:
    """The blocks of ``layers``, in graph order.

    ``whole`` takes the layers of one repeated module (``blocks.3``, or the child of the model where
    there is no number in the path) together, up to that module's last node. Otherwise each layer is
    a block. Stretches that overlap are one block.
    """
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        path = module_path(layer.calls[0]) or layer.path
        found.setdefault(_owner(path) if whole else layer.path, []).append(layer)
    stretches: list[tuple[int, int, str, list[Layer]]] = []
    for path, members in found.items():
        places = [order[call] for layer in members for call in layer.calls]
        last = max(places)
        if whole:
            last = max([last, *(at for node, at in order.items() if _belongs(node, path))])
        stretches.append((min(places), last, path, members))
    blocks: list[Block] = []
    merged: list[tuple[int, int, str, list[Layer]]] = []
    for start, stop, path, members in sorted(stretches, key=lambda one: one[:2]):
        if merged and start <= merged[-1][1]:
            before = merged.pop()
            merged.append((before[0], max(before[1], stop), before[2], before[3] + members))
        else:
            merged.append((start, stop, path, members))
    nodes = program.nodes
    for start, stop, path, members in merged:
        blocks.append(_cut(path, tuple(nodes[start : stop + 1]), tuple(members)))
    return blocks


def run_block(
    program: Program,
    block: Block,
    values: Mapping[fx.Node, Any],
    weights: Mapping[fx.Node, Tensor],
    seen: Callable[[fx.Node, Tensor], None] | None = None,
) -> list[Tensor]:
    """The block's outputs for ``values`` of its inputs; gradients flow where they are recorded.

    ``weights`` gives calls of layers another weight, and ``seen`` is shown what each of these calls
    reads. Operators that write to their input are given a copy, so ``values`` stay as they are.
    """
    interpreter = fx.Interpreter(program.graph_module)
    held = dict(values)

    def load(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return program.weight(node)
        return held[node]

    for node in block.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), load)
        if node in weights:
            if seen is not None:
                seen(node, args[0])
            args = (args[0], weights[node], *args[2:])
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and isinstance(args[0], Tensor):
            args = (args[0].clone(), *args[1:])
        result = interpreter.call_function(node.target, args, kwargs)
        held[node] = result
        if schema is not None and schema.is_mutable and isinstance(node.args[0], fx.Node):
            held[node.args[0]] = result  # later readers see what was written
    return [held[node] for node in block.outputs]


def input_moments(
    program: Program,
    block: Block,
    batches: list[dict[fx.Node, Any]],
    weights: Mapping[fx.Node, Tensor],
) -> dict[Layer, Tensor]:
    """Mean of x x^T over the rows x that each layer of a block reads, (K, K) float32."""
    owner = {call: layer for layer in block.layers for call in layer.calls}
    first = {layer.calls[0].args[0]: layer for layer in block.layers}
    sums: dict[Layer, Tensor] = {}
    rows: dict[Layer, int] = {}

    def add(call: fx.Node, value: Tensor) -> None:
        layer = owner[call]
        # Layers that read one value share its moment.
        if len(layer.calls) == 1 and first[call.args[0]] is not layer:
            return
        flat = value.detach().reshape(-1, value.shape[-1]).float()
        known = sums.setdefault(layer, torch.zeros(flat.shape[1], flat.shape[1]).to(flat))
        known.addmm_(flat.t(), flat)
        rows[layer] = rows.get(layer, 0) + len(flat)

    with torch.no_grad():
        for values in batches:
            run_block(program, block, values, weights, add)
    means = {layer: total / max(rows[layer], 1) for layer, total in sums.items()}
    return {
        layer: means[layer] if layer in means else means[first[layer.calls[0].args[0]]]
        for layer in block.layers
    }


def _owner(path: str) -> str:
    """The module that a layer is trained with: up to the first number, or the first name."""
    parts = path.split(".")
    numbered = next((at for at, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: numbered + 1])


def _belongs(node: fx.Node, owner: str) -> bool:
    path = module_path(node)
    return node.op == "call_function" and (path == owner or path.startswith(f"{owner}."))


def _cut(path: str, nodes: tuple[fx.Node, ...], layers: tuple[Layer, ...]) -> Block:
    inside = set(nodes)
    inputs = [
        read for node in nodes if node.op == "call_function" for read in node.all_input_nodes
        if read not in inside and read.op != "get_attr"
    ]  # fmt: skip
    outputs = [
        node for node in nodes
        if node.op == "call_function" and any(user not in inside for user in node.users)
        and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_floating_point()
    ]  # fmt: skip
    return Block(path, nodes, tuple(dict.fromkeys(inputs)), tuple(outputs), layers)
