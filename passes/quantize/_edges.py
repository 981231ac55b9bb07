"""Which values of a graph become 8-bit, so that runtimes can compute chains of layers in integers.

An edge is the value of a node, after a ReLU or clip that is its only reader: that one costs nothing
in integers. Layers (linear, convolution) are what a kernel exists for; pooling, concatenation and
addition follow when all they read is 8-bit and their result is wanted so; reshaping and maximum
keep the scale of what they read. A linear on more than two dimensions gives floats unless a layer
reads them: its bias is added after the integer product.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mopt.layers import LINEAR
from mopt.program import Program

_aten = torch.ops.aten

FOLDED = frozenset({
    _aten.relu.default, _aten.relu_.default, _aten.relu6.default, _aten.hardtanh.default,
    _aten.hardtanh_.default, _aten.clamp.default, _aten.clamp_.default, _aten.clamp_min.default,
})  # fmt: skip
ARITHMETIC = frozenset({
    _aten.add.Tensor, _aten.add_.Tensor, _aten.cat.default, _aten.avg_pool1d.default,
    _aten.avg_pool2d.default, _aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default,
    _aten.mean.dim,
})  # fmt: skip
KEEPING = frozenset({
    _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.permute.default,
    _aten.transpose.int, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default,
    _aten.contiguous.default, _aten.clone.default, _aten.max_pool1d.default,
    _aten.max_pool2d.default, _aten.upsample_nearest2d.vec, _aten.upsample_nearest2d.default,
})  # fmt: skip


@dataclass
class Edges:
    """The 8-bit edges: ``source[e]`` is the edge whose range e has, mostly e itself.

    Every reader of an edge in ``native`` reads the 8-bit value; of the others, only those that
    compute in integers do.
    """

    source: dict[fx.Node, fx.Node] = field(default_factory=dict)
    native: set[fx.Node] = field(default_factory=set)

    def is_integer_reader(self, user: fx.Node) -> bool:
        """Whether an operation other than a layer computes in integers."""
        return (
            _is_follower(user)
            and edge_of(user) in self.source
            and all(one in self.source for one in _inputs(user))
        )


def find_edges(program: Program, layers: set[fx.Node]) -> Edges:
    """The edges to make 8-bit for ``layers``, the calls of quantized linears and convolutions."""
    read = {call.args[0] for call in layers}
    wanted = _wanted(program, layers)
    edges = Edges()
    for node in program.graph.nodes:
        edge = edge_of(node)
        if edge in edges.source or not _is_float32(edge) or _is_overwritten(node):
            continue
        if node.target is _aten.cat.default and edge in wanted:
            _complete(edges, _inputs(node))
        follows = _is_follower(node) and all(i in edges.source for i in _inputs(node))
        if node in layers and node.target not in LINEAR:
            native = True
        elif node in layers:
            native = edge in read or (edge in wanted and node.meta["val"].dim() == 2)
        else:
            native = edge in wanted and follows
        if native or edge in read:
            keeps = follows and node.target in KEEPING and edge is node
            edges.source[edge] = edges.source[_inputs(node)[0]] if keeps else edge
        if native:
            edges.native.add(edge)
    return edges


def _complete(edges: Edges, inputs: list[fx.Node]) -> None:
    """Quantize the float inputs of a concatenation too: less work than widening the others."""
    if any(i in edges.source for i in inputs) and all(_is_float32(i) for i in inputs):
        for one in inputs:
            if not _is_overwritten(one):
                edges.source.setdefault(one, one)


def edge_of(node: fx.Node) -> fx.Node:
    """The node after which a value is quantized: a ReLU or clip if that is its only reader."""
    if len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in FOLDED and user.args[0] is node and upper_limit(user) is not None:
            return user
    return node


def upper_limit(node: fx.Node) -> float | None:
    """Where a ReLU or clip that starts at 0 ends (may be infinite), None for any other."""
    if node.target in (_aten.relu.default, _aten.relu_.default):
        return float("inf")
    if node.target is _aten.relu6.default:
        return 6.0
    is_hardtanh = node.target in (_aten.hardtanh.default, _aten.hardtanh_.default)
    defaults = (-1.0, 1.0) if is_hardtanh else (None, None)
    names = ("min_val", "max_val") if is_hardtanh else ("min", "max")
    given = [
        node.args[i + 1] if len(node.args) > i + 1 else node.kwargs.get(names[i], defaults[i])
        for i in range(2)
    ]
    if given[0] != 0 or isinstance(given[0], bool):
        return None
    if given[1] is None:
        return float("inf")
    return float(given[1]) if isinstance(given[1], int | float) else None


def _wanted(program: Program, layers: set[fx.Node]) -> set[fx.Node]:
    """Edges that layers read, and those that lead there through operations that may follow."""
    wanted: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node in layers:
            wanted.add(node.args[0])
        elif _is_follower(node) and edge_of(node) in wanted:
            wanted.update(_inputs(node))
    return wanted


def _is_follower(node: fx.Node) -> bool:
    if node.target in (_aten.add.Tensor, _aten.add_.Tensor):
        return node.kwargs.get("alpha", 1) == 1 and len(_inputs(node)) == 2
    return node.target in ARITHMETIC or node.target in KEEPING


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _is_float32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32 and node.op != "get_attr"


def _is_overwritten(node: fx.Node) -> bool:
    """Whether one of several readers changes the value in place, for the others to see."""
    return len(node.users) > 1 and any(
        isinstance(user.target, torch._ops.OpOverload)
        and user.target._schema.is_mutable
        and user.args[0] is node
        for user in node.users
    )
