"""Whole blocks of a model that could be left out: what goes in has the form of what comes out.

A block is a module of a numbered list (`layers.3`) with one result, of the shape and dtype of one
of the values it reads: leaving it out hands that value on. A sublayer is a residual sum: leaving it
out hands on what the branch was added to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.pass_base import Skip
from mopt.program import Program, module_path

_NUMBERED = re.compile(r"(?:.*\.)?\d+")
_ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
# Operators through which a residual stream runs on.
_STREAM = {
    "add", "add_", "layer_norm", "rms_norm", "relu", "relu_", "dropout", "clone", "to",
    "contiguous", "_to_copy", "silu", "gelu", "batch_norm",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Block:
    """``last`` computes what ``first`` would replace; ``path`` is the module's, or the sum's."""

    path: str
    first: fx.Node
    last: fx.Node


def find_blocks(program: Program) -> tuple[list[Block], list[Skip]]:
    """The blocks of all numbered lists of modules, in graph order, and why others are none."""
    members: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            for path in _stack(node):
                if _NUMBERED.fullmatch(path):
                    members.setdefault(path, []).append(node)
    outermost = {
        path: nodes for path, nodes in members.items()
        if not any(path.startswith(f"{other}.") for other in members)
    }  # fmt: skip
    blocks, skips = [], []
    for path, nodes in outermost.items():
        if not any(node.target in _ADD for node in nodes):
            continue
        found = _ends(path, nodes)
        if isinstance(found, str):
            skips.append(Skip(path, found))
        else:
            blocks.append(found)
    return blocks, skips


def find_sublayers(program: Program) -> list[Block]:
    """The residual sums: one operand is what the other was computed from."""
    found = []
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    for node in program.graph.nodes:
        if node.target not in _ADD or len(node.all_input_nodes) != 2:
            continue
        left, right = sorted(node.all_input_nodes, key=lambda one: order[one])
        if left.op != "get_attr" and _alike(left, node) and _depends(right, left, order):
            path = module_path(node)
            found.append(Block(f"{path}#{node.name}" if path else node.name, left, node))
    return found


def bypass(program: Program, blocks: Iterable[Block]) -> None:
    """Leave blocks out of a program, with everything that only they needed."""
    for block in blocks:
        target = block.first
        block.last.replace_all_uses_with(target)
        _erase_unread(program, block.last)
    program.refresh()


def _erase_unread(program: Program, last: fx.Node) -> None:
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node._erased or node.op in ("placeholder", "output"):
            continue
        readers = [user for user in node.users if not _only_asserts(user)]
        if readers:
            continue
        for user in list(node.users):
            program.graph.erase_node(user)
        sources = node.all_input_nodes
        program.graph.erase_node(node)
        waiting += sources


def _only_asserts(node: fx.Node) -> bool:
    return not node.users and "_assert" in str(node.target)


def _stack(node: fx.Node) -> list[str]:
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return [str(path) for path, _ in stack.values()]


def _ends(path: str, nodes: Sequence[fx.Node]) -> Block | str:
    inside = set(nodes)
    exits = [
        node for node in nodes
        if any(user not in inside and not _is_size(user) for user in node.users)
        and isinstance(node.meta.get("val"), Tensor)
    ]  # fmt: skip
    if len(exits) != 1:
        return f"{len(exits)} values of it are read by others: it cannot be left out"
    (last,) = exits
    entries = {
        source for node in nodes for source in node.all_input_nodes
        if source not in inside and source.op != "get_attr" and _alike(source, last)
    }  # fmt: skip
    stream = _stream(last, inside)
    if not any(node.target in _ADD for node in stream & inside):
        return "its result is no sum with what goes in"
    near = [source for source in entries if source in stream]
    if not near:
        return "nothing it reads has the form of its result and is added to it"
    if len(near) > 1:
        return f"it adds {len(near)} values of others: none can stand for it"
    return Block(path, near[0], last)


def _stream(last: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """What a value is a sum with, back to the values that come from outside."""
    seen: set[fx.Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in inside or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.removeprefix("aten::")
        if name in ("add", "add_"):
            waiting += [one for one in node.args[:2] if isinstance(one, fx.Node)]
        elif name in _STREAM and isinstance(node.args[0], fx.Node):
            waiting.append(node.args[0])
    return seen


def _alike(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a.dtype == b.dtype and tuple(map(str, a.shape)) == tuple(map(str, b.shape))


def _is_size(node: fx.Node) -> bool:
    return "sym_size" in str(node.target)


def _depends(node: fx.Node, on: fx.Node, order: dict[fx.Node, int]) -> bool:
    waiting, seen = [node], {node}
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is on:
                return True
            if source not in seen and order[source] > order[on]:
                seen.add(source)
                waiting.append(source)
    return False
