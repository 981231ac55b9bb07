"""A ``.pt2`` of ``torch.export.save`` as a module that can be captured again.

``torch.export.load`` executes code that a file brings along, by several routes. Call this only for
a file that is trusted like a Python file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mopt.errors import InputError, quote


class _Positional(nn.Module):
    """A graph with inputs of both kinds: takes all by position, the keyword ones last."""

    def __init__(self, body: nn.Module, keywords: tuple[str, ...]) -> None:
        super().__init__()
        self.body = body
        self.keywords = keywords

    def forward(self, *inputs: Any) -> Any:
        """The outputs of the graph."""
        count = len(inputs) - len(self.keywords)
        return self.body(*inputs[:count], **dict(zip(self.keywords, inputs[count:], strict=True)))


def load_pt2(path: Path) -> tuple[nn.Module, tuple[Any, ...] | dict[str, Any], Any]:
    """The module, its example inputs and its dynamic shapes. Runs code from the file.

    The inputs are a tuple, or a dict when the model was exported with keyword inputs only.
    Raises InputError for a file that torch cannot load or that holds no example inputs.
    """
    try:
        exported = torch.export.load(path)
    except Exception as error:  # torch raises whatever its readers and the file's code raise
        raise InputError(
            f"torch cannot load {quote(str(path))}: {type(error).__name__}: {error}",
            code="bad-pt2",
            hint="save it again with torch.export.save and the torch that is installed here",
        ) from error
    if exported.example_inputs is None:
        raise InputError(
            f"{quote(str(path))} holds no example inputs",
            code="missing-example-inputs",
            hint="export the model again and save it with torch.export.save, which keeps them",
        )
    args, kwargs = exported.example_inputs
    values = (*args, *kwargs.values())
    shapes = _dynamic_shapes(exported, values)
    module: Any = exported.module(check_guards=False)
    # A graph has one mode; torch makes asking for another an error, which capture would meet.
    module.eval = module.train = lambda mode=False: module
    if not kwargs:
        return module, values, shapes
    if not args:
        return module, kwargs, None if shapes is None else dict(zip(kwargs, shapes, strict=True))
    return _Positional(module, tuple(kwargs)).eval(), values, (shapes and (shapes,))


def _dynamic_shapes(
    exported: torch.export.ExportedProgram, values: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Which sizes the graph left open, in the nesting of the inputs; None when all are fixed."""
    known = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    found = []
    for name in exported.graph_signature.user_inputs:
        value = known.get(name) if isinstance(name, str) else None
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        open_dims = [dim for dim, size in enumerate(shape) if not isinstance(size, int)]
        found.append(dict.fromkeys(open_dims, torch.export.Dim.AUTO) or None)
    if not any(found):
        return None
    shapes: tuple[Any, ...] = pytree.tree_unflatten(found, pytree.tree_flatten(values)[1])
    return shapes
