"""Inputs of other sizes than the example's: what shows that a dynamic dimension really varies."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from mopt.program import Program


def second_size(program: Program) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The example inputs with every dynamic dimension doubled, or None.

    None when nothing is dynamic. The program itself need not run at that size.
    """
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    leaves, spec = pytree.tree_flatten((program.args, program.kwargs))
    grown, any_dynamic = [], False
    for leaf, node in zip(leaves, placeholders, strict=True):
        value = node.meta.get("val")
        if isinstance(leaf, torch.Tensor) and isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    any_dynamic = True
                    leaf = torch.cat([leaf, leaf], dim)
        grown.append(leaf)
    if not any_dynamic:
        return None
    args, kwargs = pytree.tree_unflatten(grown, spec)
    return args, kwargs


def resized(program: Program, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The example inputs with ``batch`` entries along each first dimension that is dynamic.

    None when no first dimension is dynamic and the example has another size.
    """
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    leaves, spec = pytree.tree_flatten((program.args, program.kwargs))
    grown = []
    for leaf, node in zip(leaves, placeholders, strict=True):
        value = node.meta.get("val")
        if isinstance(leaf, torch.Tensor) and isinstance(value, torch.Tensor) and leaf.dim():
            if isinstance(value.shape[0], torch.SymInt):
                repeats = -(-batch // leaf.shape[0])
                leaf = leaf.repeat(repeats, *[1] * (leaf.dim() - 1))[:batch].contiguous()
            elif leaf.shape[0] != batch:
                return None
        grown.append(leaf)
    args, kwargs = pytree.tree_unflatten(grown, spec)
    return args, kwargs
