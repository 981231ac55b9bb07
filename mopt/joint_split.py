"""Writing a plan into a joint graph: repetitions are copied into backward, which is cut off."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.partitioners import _extract_fwd_bwd_modules
from torch.utils import _pytree as pytree

from mopt.errors import InternalError
from mopt.joint_graph import BATCH_NORMS, NUMBERS, Joint, tensors
from mopt.joint_tags import is_backward
from mopt.offload import arrived, fetch, put, settle
from mopt.recompute import Item
from mopt.reversible import undo
from mopt.saved_codecs import RESTORE, SQUEEZE

aten = torch.ops.aten


def split(
    joint: Joint,
    saved: frozenset[int],
    items: Sequence[Item],
    settled: Mapping[int, int] | None = None,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward module of a plan; the joint graph is rewritten."""
    writer = _Writer(joint, saved)
    for begin, end in (settled or {}).items():
        writer.settle(begin, end)
    writer.write(items)
    graph = joint.module.graph
    graph.eliminate_dead_code()
    values: list[fx.Node] = []
    numbers: list[fx.Node] = []
    for node in graph.nodes:
        if is_backward(node) or not any(
            is_backward(u) or (u.op == "output" and node in _gradients(joint)) for u in node.users
        ):
            continue
        if isinstance(node.meta.get("val"), Tensor):
            values.append(node)
        elif isinstance(node.meta.get("val"), NUMBERS) and node.op != "get_attr":
            numbers.append(node)
    forward, backward = _extract_fwd_bwd_modules(
        joint.module, values, saved_sym_nodes=numbers, num_fwd_outputs=joint.num_outputs
    )
    # Random calls count as effects, so that the stream of random numbers stays that of plain
    # PyTorch; extraction leaves those of the other half behind as dead code.
    forward.graph.eliminate_dead_code(lambda n: n.is_impure() and not is_backward(n))
    backward.graph.eliminate_dead_code(lambda n: n.is_impure() and _stays(n))
    forward.recompile()
    backward.recompile()
    return forward, backward


def _stays(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or is_backward(node)


def _gradients(joint: Joint) -> list[fx.Node]:
    flat = pytree.tree_leaves(joint.module.graph.output_node().args[0])
    return [n for n in flat[joint.num_outputs :] if isinstance(n, fx.Node)]


class _Writer:
    """Copies forward calls into backward and leads backward's reads to the copies."""

    def __init__(self, joint: Joint, saved: frozenset[int]) -> None:
        self.joint, self.saved = joint, saved
        self.graph = joint.module.graph
        self.calls = set(joint.backward)
        self.stay = saved & joint.problem.results
        # What backward reads instead of a forward value, and the versions that this stands for.
        self.now: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]] = {}
        self.version: dict[int, int] = {}
        # Values on their way back, and the folder they come from.
        self.coming: dict[fx.Node, Any] = {}

    def settle(self, begin: int, end: int) -> None:
        """Wait behind forward call ``end`` for what call ``begin`` moves out."""
        out = self.joint.forward[begin]
        value, folder = out.args
        assert isinstance(value, fx.Node)
        with self.graph.inserting_after(self.joint.forward[end]):
            done = self.graph.call_function(settle, (out, value, folder))
        done.meta = dict(out.meta)
        self.joint.owner[self.storages(out)[0]] = done

    def storages(self, node: fx.Node) -> tuple[int, ...]:
        """The numbers of the storages that a node's value lies in."""
        return tuple(self.joint.numbers[t.untyped_storage()._cdata] for t in tensors(node))

    def write(self, items: Sequence[Item]) -> None:
        """Go through backward, adding each repetition before the next call."""
        order = [
            n for n in self.graph.nodes
            if n.op == "output" or (n.op == "call_function" and is_backward(n))
        ]  # fmt: skip
        place = {node: i for i, node in enumerate(order)}
        reached = 0
        for item in items:
            if item.repeat:
                self._repeat(item.index, order[reached])
                continue
            end = place[self.joint.backward[item.index]] + 1
            for node in order[reached:end]:
                self._redirect(node)
            reached = end
        for node in order[reached:]:
            self._redirect(node)

    def _of_forward(self, node: fx.Node) -> bool:
        """Whether a node's value lies in forward's storages: itself, or a view that backward took.

        Such views are traced where autograd kept them, which may be before the value is repeated.
        """
        if node in self.calls or not tensors(node):
            return False
        return any(s in self.joint.problem.maker for s in self.storages(node))

    def _redirect(self, node: fx.Node) -> None:
        if node.op == "output":
            flat, spec = pytree.tree_flatten(node.args[0])
            for i in range(self.joint.num_outputs, len(flat)):
                if isinstance(flat[i], fx.Node):
                    flat[i] = self._current(flat[i], node)
            node.args = (pytree.tree_unflatten(flat, spec),)
            return
        if self._of_forward(node):
            return
        sources = {s: self._current(s, node) for s in node.all_input_nodes}
        if any(old is not new for old, new in sources.items()):
            node.args = fx.map_arg(node.args, lambda s: sources.get(s, s))
            node.kwargs = fx.map_arg(node.kwargs, lambda s: sources.get(s, s))

    def _current(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """What stands for a value in backward: itself where it is kept, given or backward's own."""
        if node.op in ("placeholder", "get_attr") or not tensors(node):
            return node
        if is_backward(node) and not self._of_forward(node):
            return node
        own = self.storages(node)
        key = tuple(self.version.get(s, 0) for s in own)
        known = self.now.get(node)
        if known is not None and known[1] == key:
            if known[0] in self.coming:
                self.now[node] = self._arrived(known[0], before), key
            return self.now[node][0]
        if own[0] in self.saved and not key[0] and self.joint.owner[own[0]] is node:
            return node
        problem = self.joint.problem
        if not all(
            s in self.saved or s in problem.given or v for s, v in zip(own, key, strict=True)
        ):
            raise InternalError(f"{node.name} is neither kept nor repeated", code="bad-plan")
        sources = {s: self._current(s, before) for s in node.all_input_nodes}
        with self.graph.inserting_before(before):
            copy = self.graph.node_copy(node, sources.__getitem__)
        _mark(copy)
        self.now[node] = copy, key
        return copy

    def _arrived(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """A value that is being fetched, once it is there."""
        folder = self.coming.pop(value)
        with self.graph.inserting_before(before):
            there = self.graph.call_function(arrived, (value, folder))
        there.meta = dict(value.meta)
        return there

    def _fetch(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        """Begin to read a value back; it is waited for where it is used."""
        value, folder = node.args
        assert isinstance(value, fx.Node)
        like = value.meta["val"]
        handle = self.joint.owner[self.storages(node)[0]]
        arguments = (handle, folder, list(like.shape), list(like.stride()), like.dtype, like.device)
        copy = self.graph.call_function(fetch, arguments)
        copy.meta = dict(value.meta)
        _mark(copy)
        self.coming[copy] = folder
        return {value: copy}

    def _repeat(self, index: int, before: fx.Node) -> None:
        node, again = self.joint.forward[index], self.joint.problem.forward[index].again
        assert again is not None
        with self.graph.inserting_before(before):
            if node.target is put:
                parts = self._fetch(node)
            else:
                parts = _write_again(self.graph, node, lambda s: self._current(s, before))
        for s in again.makes:
            if s not in self.stay:
                self.version[s] = self.version.get(s, 0) + 1
        for old, new in parts.items():
            own = self.storages(old)
            if not any(s in self.stay for s in own):
                self.now[old] = new, tuple(self.version.get(s, 0) for s in own)


def _mark(node: fx.Node) -> None:
    node.meta = {**node.meta, "partitioner_tag": "is_backward"}
    node.meta.pop("recompute", None)


def _parts(node: fx.Node) -> Mapping[int, fx.Node]:
    """The selections of a call with several results, by place."""
    return {u.args[1]: u for u in node.users if u.target is operator.getitem}  # type: ignore[misc]


def _write_again(
    graph: fx.Graph, node: fx.Node, takes: Callable[[fx.Node], fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Write a repetition; returns what stands for the call and its selections."""
    if node.target is aten.native_dropout.default and node.args[2] is not False:
        return _dropout_again(graph, node, takes)
    if node.target is SQUEEZE:
        return _restored(graph, node, takes)
    if node.target is undo:
        return _undone(graph, node, takes)
    selections = {i: u for i, u in _parts(node).items() if not is_backward(u)}
    sources = {s: takes(s) for s in node.all_input_nodes}
    if node.target in BATCH_NORMS and node.args[5] is True:
        x, weight, bias = (sources[a] if isinstance(a, fx.Node) else a for a in node.args[:3])
        # Without averages to move: the results of this batch are the same.
        copy = graph.call_function(
            aten.native_batch_norm.default,
            (x, weight, bias, None, None, True, *node.args[6:]),
        )
        copy.meta = {**node.meta, "val": node.meta["val"][:3]}
        selections = {i: u for i, u in selections.items() if i < 3}
    else:
        copy = graph.node_copy(node, sources.__getitem__)
    _mark(copy)
    found = {node: copy}
    for index, selection in selections.items():
        picked = graph.call_function(operator.getitem, (copy, index))
        picked.meta = dict(selection.meta)
        _mark(picked)
        found[selection] = picked
    return found


def _restored(
    graph: fx.Graph, node: fx.Node, takes: Callable[[fx.Node], fx.Node]
) -> dict[fx.Node, fx.Node]:
    """The value that a smaller form was made of."""
    value = node.args[0]
    assert isinstance(value, fx.Node)
    like = value.meta["val"]
    copy = graph.call_function(RESTORE, (takes(node), node.args[1], list(like.shape), like.dtype))
    copy.meta = dict(value.meta)
    _mark(copy)
    return {value: copy}


def _undone(
    graph: fx.Graph, node: fx.Node, takes: Callable[[fx.Node], fx.Node]
) -> dict[fx.Node, fx.Node]:
    """A part of a sum or a scaled value, from the result."""
    result, other, value = node.args
    assert isinstance(result, fx.Node) and isinstance(value, fx.Node)
    if isinstance(other, fx.Node):
        copy = graph.call_function(aten.sub.Tensor, (takes(result), takes(other)))
    else:
        copy = graph.call_function(aten.div.Tensor, (takes(result), other))
    copy.meta = dict(value.meta)
    _mark(copy)
    return {value: copy}


def _dropout_again(
    graph: fx.Graph, node: fx.Node, takes: Callable[[fx.Node], fx.Node]
) -> dict[fx.Node, fx.Node]:
    """The kernel multiplies by the mask and then by 1 / (1 - p), in this order."""
    parts = _parts(node)
    source, p = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(p, float)
    masked = graph.call_function(aten.mul.Tensor, (takes(source), parts[1]))
    masked.meta = dict(parts[0].meta)
    _mark(masked)
    scaled = graph.call_function(aten.mul.Tensor, (masked, 0.0 if p == 1 else 1.0 / (1.0 - p)))
    scaled.meta = dict(parts[0].meta)
    _mark(scaled)
    return {parts[0]: scaled}
