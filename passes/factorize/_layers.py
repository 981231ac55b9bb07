"""What keeps a layer whole in every pass of this family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mopt.layers import Layer, is_returned
from mopt.program import Program


def count_readers(program: Program) -> Mapping[str, int]:
    """How many nodes read each stored tensor, through whichever node of the graph."""
    found: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            found[str(node.target)] += len(node.users)
    return found


def whole_reason(layer: Layer, readers: Mapping[str, int]) -> str | None:
    """Why a layer is not to be taken apart, whatever its shape, or None."""
    if readers[str(layer.weight.target)] > len(layer.calls):
        return "its weight is used elsewhere too, which would keep it whole"
    if any(is_returned(call) for call in layer.calls):
        return "it is the model's head, whose errors nothing smooths"
    return None
