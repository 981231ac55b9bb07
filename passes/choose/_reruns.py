"""Runs changed copies of a program, on the same inputs again and again, from where they differ."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mopt.effects import may_alias
from mopt.pipeline import flat_tensors
from mopt.program import Program

# Values of the original that are kept: up to this with the weights together, or this share of the
# weights where those are larger.
_TOGETHER_BYTES = 1 << 29
_WEIGHTS_SHARE = 0.25


def default_limit(program: Program) -> int:
    """Bytes of values to keep for a program."""
    weights = sum(t.numel() * t.element_size() for t in program.graph_module.state_dict().values())
    return int(max(_TOGETHER_BYTES - weights, _WEIGHTS_SHARE * weights))


class Reruns:
    """Values of a program on some inputs, and runs of its copies that start from them.

    Where not all values fit into ``limit`` bytes, those that are read over the longest stretches
    are kept, such as the sums between the blocks of a transformer: what is missing between two of
    them is computed again. A program that writes to memory keeps none.
    """

    def __init__(
        self, program: Program, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], limit: int
    ) -> None:
        self._calls = calls
        self._names = {node.name for node in program.graph.nodes}
        self._values: list[dict[str, Any]] = []
        self.outputs: list[list[Tensor]] = []
        # What a call writes into a value shows nowhere in the graph.
        self._is_pure = not any(_writes(node) for node in program.graph.nodes)
        kept: set[str] = set()
        if calls and self._is_pure:
            kept = _worth_keeping(program, calls[0], limit // len(calls))
        for args, kwargs in calls:
            values: dict[str, Any] = {}

            def visit(node: fx.Node, value: Any, values: dict[str, Any] = values) -> None:
                if node.name in kept:
                    values[node.name] = value

            self.outputs.append(flat_tensors(program.interpret(visit, args, kwargs)))
            self._values.append(values)

    def run(self, changed: Program, index: int) -> list[Tensor]:
        """Outputs of a copy in which nodes whose values differ have new names, or read such."""
        args, kwargs = self._calls[index]
        if not self._is_pure:
            return flat_tensors(changed.run_flat(*args, **kwargs))
        known = self._values[index]
        fresh: set[fx.Node] = set()
        for node in changed.graph.nodes:
            if node.op not in ("get_attr", "placeholder") and (
                node.name not in self._names or any(i in fresh for i in node.all_input_nodes)
            ):
                fresh.add(node)
        start = {
            node: known[node.name]
            for node in changed.graph.nodes if node.name in known and node not in fresh
        }  # fmt: skip
        needed = _needed(changed.graph, start)
        start = {node: value for node, value in start.items() if node in needed}
        flat = changed.flat_inputs(args, kwargs)
        with torch.no_grad():
            out = _Partial(changed.graph_module, needed).run(
                *flat, initial_env=start, enable_io_processing=False
            )
        return flat_tensors(out)


class _Partial(fx.Interpreter):
    """Runs what is needed."""

    def __init__(self, module: fx.GraphModule, needed: set[fx.Node]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._needed = needed

    def run_node(self, n: fx.Node) -> Any:
        if n in self._needed or n.op in ("placeholder", "output"):
            return super().run_node(n)
        return None


def _needed(graph: fx.Graph, known: dict[fx.Node, Any]) -> set[fx.Node]:
    """What the output reads, back to the known values."""
    needed: set[fx.Node] = set()
    todo = [graph.output_node()]
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                if node not in known:
                    todo.append(node)
    return needed


def _worth_keeping(
    program: Program, call: tuple[tuple[Any, ...], dict[str, Any]], limit: int
) -> set[str]:
    """Names of nodes whose values fit into ``limit`` bytes, those of long life first."""
    sizes: dict[fx.Node, int] = {}

    def visit(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and node.op == "call_function" and not _is_view(node):
            sizes[node] = value.numel() * value.element_size()

    program.interpret(visit, *call)
    place = {node: index for index, node in enumerate(program.graph.nodes)}

    def order(node: fx.Node) -> tuple[int, float]:
        life = max((place[user] - place[node] for user in node.users), default=0)
        return -life.bit_length(), _scattered(place[node])

    kept, left = set(), limit
    for node in sorted(sizes, key=order):
        if sizes[node] <= left:
            left -= sizes[node]
            kept.add(node.name)
    return kept


def _scattered(index: int) -> float:
    """The index's bits mirrored at the point: any first few of these are spread evenly."""
    return sum(((index >> bit) & 1) / (2 << bit) for bit in range(index.bit_length()))


def _is_view(node: fx.Node) -> bool:
    """Keeping a view keeps all that it is a view of; computing it again costs nothing."""
    if node.target is operator.getitem:
        parent = node.args[0]
        return isinstance(parent, fx.Node) and _is_view(parent)
    return bool(may_alias(node))


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
