"""Values of reversible blocks, had again from what was made of them: ``a = (a + b) - b``.

In ``y1 = x1 + F(x2); y2 = x2 + G(y1)`` every input follows from the outputs, so that none has to be
kept (Gomez et al., NeurIPS 2017; MEFT, Liao et al., NeurIPS 2023). The rewriting offers it to the
plan as one more way to have a value; whether a block is reversible is what the plan finds out.
Inverting rounds: it is offered only as far as errors stay below ``_MOST`` of the value, which a
scale below 1 shortens, for it multiplies them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

aten = torch.ops.aten
INVERSE = "inverse"
_MOST = 1e-3
_LEAST = 1024


def undo(result: Tensor, other: Tensor | float, value: Tensor) -> None:
    """Stands behind ``result = value + other`` (or ``value * other`` for a number); never run."""


def offer_inverses(module: fx.GraphModule, nodes: Iterable[fx.Node]) -> int:
    """Write a mark behind each sum whose parts may be had again from it; returns how many.

    ``nodes`` are forward's values in order, without views.
    """
    owners = dict.fromkeys(nodes)
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    growth: dict[fx.Node, float] = {}
    found = 0
    for node in reversed(owners):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        limit = _MOST / torch.finfo(value.dtype).eps * 2
        for part, other in _parts(node, order):
            scale = abs(other) if isinstance(other, float) else 1.0
            errors = growth.get(node, 1.0) / min(1.0, scale or 0.5**64)
            if errors >= limit or not _alike(part, node) or part not in owners:
                continue
            growth[part] = max(growth.get(part, 1.0), errors)
            with module.graph.inserting_after(node):
                mark = module.graph.call_function(undo, (node, other, part))
            mark.meta = {
                key: node.meta[key] for key in ("nn_module_stack", "fwd_nn_module_stack")
                if key in node.meta
            } | {"val": None, "partitioner_tag": "is_forward"}  # fmt: skip
            found += 1
    return found


def _parts(node: fx.Node, order: dict[fx.Node, int]) -> list[tuple[fx.Node, fx.Node | float]]:
    """Values that follow from a result and the other operand."""
    if len(node.args) != 2 or node.kwargs:
        return []
    one, two = node.args
    if node.target is aten.add.Tensor and isinstance(one, fx.Node) and isinstance(two, fx.Node):
        # The stream is older than what a block adds to it, which is computed again in any case.
        if one is two:
            return []
        return [(one, two)] if order[one] < order[two] else [(two, one)]
    if node.target is aten.mul.Tensor and isinstance(one, fx.Node) and isinstance(two, float):
        return [(one, two)]
    return []


def _alike(part: fx.Node, node: fx.Node) -> bool:
    """Whether a part has the result's form and memory wholly its own."""
    a, b = part.meta.get("val"), node.meta["val"]
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not all(isinstance(n, int) for n in a.shape) or a.numel() < _LEAST:
        return False
    return a.stride() == b.stride() and a.untyped_storage().nbytes() == a.numel() * a.element_size()
