"""What AOTAutograd says about the nodes of a joint graph."""

from __future__ import annotations

from torch import fx


def is_backward(node: fx.Node) -> bool:
    """Whether AOTAutograd traced a node in the backward pass."""
    return node.meta.get("partitioner_tag") == "is_backward"
