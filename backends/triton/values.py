"""Types and shapes of a graph's values, as an artifact keeps them.

Patterns ask for them when a model is compiled and again when it is loaded, where there is no
capture any more: both must find the same sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.errors import ArtifactError
from mopt.flops import shape_of

_TYPES = {str(dtype)[6:]: dtype for dtype in (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.bool,
)}  # fmt: skip
_KEY = "triton_value"


@dataclass(frozen=True)
class Value:
    """A tensor: sizes that vary stand in ``shape`` as expressions, in ``hints`` as once seen."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    hints: tuple[int, ...]

    def dim(self) -> int:
        """The number of axes."""
        return len(self.shape)


def value_of(node: Any) -> Value | None:
    """What a node stands for, None where that is no tensor."""
    if not isinstance(node, fx.Node):
        return None
    found = node.meta.get(_KEY)
    if found is None:
        seen = node.meta.get("val")
        if isinstance(seen, Tensor):
            sizes = tuple(n if isinstance(n, int) else str(n) for n in seen.shape)
            found = node.meta[_KEY] = Value(seen.dtype, sizes, shape_of(seen))
    return found


def values_as_json(graph: fx.Graph) -> dict[str, Any]:
    """Plain data, by the names of nodes: ``[type, sizes, sizes that were seen]``."""
    found = {node.name: value for node in graph.nodes if (value := value_of(node)) is not None}
    return {
        name: [str(value.dtype)[6:], list(value.shape), list(value.hints)]
        for name, value in found.items() if str(value.dtype)[6:] in _TYPES
    }  # fmt: skip


def restore_values(module: fx.GraphModule, data: Mapping[str, Any]) -> None:
    """Give the nodes of a graph that was read from a file what :func:`values_as_json` kept.

    Raises ArtifactError ``malformed-kernels``.
    """
    for node in module.graph.nodes:
        entry = data.get(node.meta.get("name", node.name))
        if entry is None:
            continue
        try:
            dtype, shape, hints = entry
            sizes = tuple(n if isinstance(n, int) else str(n) for n in shape)
            node.meta[_KEY] = Value(_TYPES[dtype], sizes, tuple(int(n) for n in hints))
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                "the values of a graph are malformed", code="malformed-kernels"
            ) from error
