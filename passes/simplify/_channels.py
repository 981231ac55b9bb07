"""Operators that move data around without mixing channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mopt.effects import argument

# Whatever the axes, every element of the result is one element of the argument.
_MOVES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand",
    "slice", "narrow", "select", "permute", "transpose", "t", "alias", "detach", "contiguous",
    "clone", "mT", "swapaxes",
}  # fmt: skip
_ELEMENTWISE = {"alias", "detach", "contiguous", "clone", "to", "_to_copy", "type_as"}
_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}


def moves_elements(node: fx.Node) -> bool:
    """Whether a call only picks and reorders elements of its first argument."""
    return _name(node) in _MOVES or is_idle_dropout(node)


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether a call is a dropout that is switched off."""
    return _name(node) in ("dropout", "alpha_dropout", "feature_dropout") and (
        argument(node, "train") is False
    )


def keeps_last_axis(node: fx.Node, source: fx.Node) -> bool:
    """Whether every row of a call's value along the last axis is a row of ``source``."""
    if node.op != "call_function" or not node.args or node.args[0] is not source:
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    name = _name(node)
    if name in _ELEMENTWISE:
        return after.is_floating_point()
    if is_idle_dropout(node):
        return True
    if not after.dim() or not _same(before.shape[-1], after.shape[-1]):
        return False
    if name in _RESHAPES:
        return True
    if name in ("slice", "narrow", "select", "unsqueeze", "squeeze", "index_select"):
        return not _touches_last(node, before.dim())
    if name in ("transpose", "permute", "swapaxes"):
        return _last_stays(node, before.dim())
    return name == "expand"


def _touches_last(node: fx.Node, rank: int) -> bool:
    axis = argument(node, "dim")
    if not isinstance(axis, int):
        return True
    limit = rank + 1 if _name(node) == "unsqueeze" else rank
    return axis % limit == limit - 1


def _last_stays(node: fx.Node, rank: int) -> bool:
    if _name(node) == "permute":
        return list(argument(node, "dims"))[-1] % rank == rank - 1
    return rank - 1 not in (axis % rank for axis in node.args[1:3])  # type: ignore[operator]


def _same(left: Any, right: Any) -> bool:
    return bool(statically_known_true(left == right))


def _name(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.removeprefix("aten::")
