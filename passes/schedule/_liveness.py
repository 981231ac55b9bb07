"""From a program to the problem of ordering its calls, and back to a program in a new order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from mopt.effects import is_pure, may_write, memory_roots
from mopt.passes.schedule._order_problem import OrderProblem
from mopt.program import Program
from mopt.storages import CallFacts, Origin, StorageTrace

_SIZES = ("aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset")


@dataclass(frozen=True)
class Liveness:
    """The calls of a program as an order problem.

    ``calls[v]`` is operator ``v``; views, sizes and weights are no operators: they take no memory
    and stand right before the first call that needs them. Storage numbers are those of ``trace``;
    weights, and with a backend inputs, live as long as the caller likes and have size 0.
    """

    program: Program
    trace: StorageTrace
    calls: tuple[fx.Node, ...]
    problem: OrderProblem


def liveness_of(
    program: Program, trace: StorageTrace, facts: Mapping[str, CallFacts] | None = None
) -> Liveness:
    """Who makes, touches and keeps what. ``facts`` (by node name) are a backend's workspaces and
    reuses; without them there is no workspace, and results of elementwise calls may lie where an
    input did."""
    written = _written_groups(program)
    calls = [n for n in program.graph.nodes if _is_call(n, trace, written)]
    index = {node: v for v, node in enumerate(calls)}
    reach = _reach(program, index)
    before: list[set[int]] = [
        {u for source in node.all_input_nodes for u in reach[source]} for node in calls
    ]
    for u, v in _effect_edges(calls, written):
        before[v].add(u)
    origins = {Origin.MADE} if facts is not None else {Origin.MADE, Origin.INPUT}
    counted = {s for s, info in enumerate(trace.storages) if info.origin in origins}
    read = {s for node in calls for s in trace.touched(node)}
    output = program.graph.output_node()
    kept = {s for source in output.all_input_nodes for s in trace.of(source)}
    if facts is None:
        takes = [_elementwise_takes(node, trace) for node in calls]
        workspace = [0] * len(calls)
    else:
        known = [facts.get(node.name, CallFacts()) for node in calls]
        takes = [_named_takes(node, fact, trace) for node, fact in zip(calls, known, strict=True)]
        workspace = [
            min(fact.placed_bytes, fact.plain_bytes) if fact.call else fact.plain_bytes
            for fact in known
        ]
    problem = OrderProblem(
        before=tuple(tuple(sorted(found)) for found in before),
        makes=tuple(tuple(trace.made_by(node)) for node in calls),
        touches=tuple(tuple(sorted(trace.touched(node) & counted)) for node in calls),
        sizes=tuple(
            info.bytes if s in counted else 0 for s, info in enumerate(trace.storages)
        ),
        kept=frozenset(kept & counted),
        workspace=tuple(workspace),
        takes=tuple(takes),
        given=frozenset(
            s for s in counted & (read | kept) if trace.storages[s].origin is Origin.INPUT
        ),
    )  # fmt: skip
    return Liveness(program, trace, tuple(calls), problem)


def _is_call(node: fx.Node, trace: StorageTrace, written: Mapping[fx.Node, int]) -> bool:
    """Whether a node computes, writes or reads values; the others only describe memory."""
    if node.op not in ("call_function", "call_module", "call_method"):
        return False
    if not is_pure(node) or node in written or trace.made_by(node):
        return True
    if trace.views.get(node.name):
        return False
    return isinstance(node.target, torch._ops.OpOverload) and (
        node.target._schema.name not in _SIZES
    )


def _reach(program: Program, index: Mapping[fx.Node, int]) -> dict[fx.Node, frozenset[int]]:
    """For every node the operators it is, or looks through."""
    reach: dict[fx.Node, frozenset[int]] = {}
    for node in program.graph.nodes:
        if node in index:
            reach[node] = frozenset((index[node],))
        else:
            reach[node] = frozenset(u for s in node.all_input_nodes for u in reach[s])
    return reach


def _written_groups(program: Program) -> dict[fx.Node, int]:
    """The nodes whose memory some call may write to, at any input sizes, with a number of the
    memory they may share."""
    root = memory_roots(program)
    groups = {
        root[target]: number
        for number, node in enumerate(program.graph.nodes)
        if may_write(node)
        for target in node.all_input_nodes
    }
    return {n: groups[root[n]] for n in program.graph.nodes if root[n] in groups}


def _effect_edges(
    calls: Sequence[fx.Node], written: Mapping[fx.Node, int]
) -> Iterable[tuple[int, int]]:
    """Pairs that keep their order: writers among readers, and what draws, asserts or prints."""
    readers: dict[int, list[int]] = {}
    writer: dict[int, int] = {}
    last_effect: int | None = None
    for v, node in enumerate(calls):
        groups = {written[n] for n in (node, *node.all_input_nodes) if n in written}
        for group in groups:
            if group in writer:
                yield writer[group], v
            if may_write(node):
                yield from ((u, v) for u in readers.pop(group, ()))
                writer[group] = v
            else:
                readers.setdefault(group, []).append(v)
        if _has_effect(node):
            if last_effect is not None:
                yield last_effect, v
            last_effect = v


def _has_effect(node: fx.Node) -> bool:
    """Whether a call draws random numbers, may stop the run, or cannot be looked into."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return not is_pure(node)
    schema = node.target._schema
    return not schema.returns or (
        torch.Tag.nondeterministic_seeded in node.target.tags and not is_pure(node)
    )


def _elementwise_takes(node: fx.Node, trace: StorageTrace) -> tuple[int, ...]:
    """Storages of inputs that look exactly like the one result of an elementwise call."""
    if not isinstance(node.target, torch._ops.OpOverload) or (
        torch.Tag.pointwise not in node.target.tags
    ):
        return ()
    return _named_takes(node, CallFacts(takes=tuple(n.name for n in node.all_input_nodes)), trace)


def _named_takes(node: fx.Node, fact: CallFacts, trace: StorageTrace) -> tuple[int, ...]:
    views, made = trace.views.get(node.name, ()), trace.made_by(node)
    if len(views) != 1 or len(made) != 1:
        return ()
    found = []
    for name in fact.takes:
        source = trace.views.get(name, ())
        if len(source) != 1 or source[0].storage in found:
            continue
        info = trace.storages[source[0].storage]
        alike = (source[0].shape, source[0].stride, source[0].dtype, source[0].first) == (
            views[0].shape, views[0].stride, views[0].dtype, views[0].first,
        )  # fmt: skip
        # Another argument may look at the same memory in another way.
        same = [n for n in node.all_input_nodes if source[0].storage in trace.of(n)]
        if alike and len(same) == 1 and info.bytes == trace.storages[made[0]].bytes:
            found.append(source[0].storage)
    return tuple(s for s in found if trace.storages[s].origin is Origin.MADE)


def reorder(live: Liveness, order: Sequence[int]) -> None:
    """Put the calls of the program into a new order, what they look through right before them."""
    graph = live.program.graph
    output = graph.output_node()
    placed: dict[fx.Node, int] = {}

    def place(node: fx.Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [s for s in top.all_input_nodes if s not in placed]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            if top not in placed:
                placed[top] = len(placed)
                output.prepend(top)

    nodes = list(graph.nodes)
    for node in nodes:
        if node.op in ("placeholder", "get_attr"):
            place(node)
    for v in order:
        place(live.calls[v])
    for node in nodes:
        if node is not output and node not in placed:
            # Nobody reads it: at the end it would keep memory alive until then.
            max(node.all_input_nodes, key=placed.__getitem__).append(node)
            placed[node] = -1
