"""Calls whose value is one of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mopt.effects import argument
from mopt.program import Program

# Row-major order is kept, so an equal shape means equal elements.
_RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand",
    "slice", "narrow", "alias", "detach", "contiguous", "view_as", "reshape_as", "expand_as",
}  # fmt: skip
_CASTS = {"to", "type_as"}
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_COPIES = {"clone", "lift_fresh_copy", "_to_copy", "repeat", "constant_pad_nd", "pad", "cat"}
_PERMUTES = {"permute", "transpose", "t", "swapaxes", "swapdims", "mT"}
# What a floating-point dtype can be widened to and come back from unchanged.
_WIDER = {
    torch.float16: {torch.float32, torch.float64},
    torch.bfloat16: {torch.float32, torch.float64},
    torch.float32: {torch.float64},
}


@dataclass(frozen=True)
class Identity:
    """A call whose value equals ``source``; ``obstacle`` says why it must stay nevertheless.

    ``same_memory`` tells that the value is ``source`` itself or a view of it, not a copy.
    """

    source: fx.Node
    same_memory: bool
    obstacle: str | None = None


def find_identity(program: Program, node: fx.Node) -> Identity | None:
    """The argument a call equals bit for bit, in dtype, shape and layout, if there is one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target.namespace != "aten" or not isinstance(node.meta.get("val"), Tensor):
        return None
    name = node.target._schema.name.removeprefix("aten::")
    rule = _RULES.get(name)
    return rule(program, node, name) if rule else None


def _first(node: fx.Node) -> fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _unchanged(program: Program, node: fx.Node, name: str) -> Identity | None:
    """Reshapes, casts and dropouts: equal if the metadata says so."""
    source = _first(node)
    if source is None or not same_layout(node, source):
        return None
    if name in _DROPOUTS and argument(node, "train") is not False and argument(node, "p") != 0:
        return None
    copies = name in _COPIES or argument(node, "copy") is True
    return Identity(source, same_memory=not copies)


def _concatenation(program: Program, node: fx.Node, name: str) -> Identity | None:
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 1:
        return None
    source = parts[0]
    assert isinstance(source, fx.Node)
    return Identity(source, same_memory=False) if same_layout(node, source) else None


def _padding(program: Program, node: fx.Node, name: str) -> Identity | None:
    widths = argument(node, "pad")
    is_nothing = all(isinstance(width, int) and width == 0 for width in widths)
    return _unchanged(program, node, name) if is_nothing else None


def _round_trip(program: Program, node: fx.Node, name: str) -> Identity | None:
    """A cast back from a wider dtype, or a reshape back to an earlier shape."""
    direct = _unchanged(program, node, name)
    if direct is not None:
        return direct
    source = _first(node)
    kinds = _CASTS if name in _CASTS else _RESHAPES - {"expand", "expand_as", "slice", "narrow"}
    while source is not None and _aten_name(source) in kinds and name in kinds:
        origin = _first(source)
        if origin is None or not isinstance(origin.meta.get("val"), Tensor):
            return None
        if name in _CASTS:
            wide = source.meta["val"].dtype
            if wide not in _WIDER.get(origin.meta["val"].dtype, ()):
                return None
        if same_layout(node, origin):
            return Identity(origin, same_memory=name not in _CASTS)
        source = origin
    return None


def _permutation(program: Program, node: fx.Node, name: str) -> Identity | None:
    """A chain of permutations that ends where it began."""
    order = _order(node)
    source = _first(node)
    while order is not None and source is not None:
        if order == list(range(len(order))):
            return Identity(source, same_memory=True) if same_layout(node, source) else None
        before = _order(source)
        order = [before[axis] for axis in order] if before is not None else None
        source = _first(source)
    return None


def _order(node: fx.Node) -> list[int] | None:
    """``order[i]`` is the axis of the argument that becomes axis i; None if not a permutation."""
    name = _aten_name(node)
    source = _first(node)
    if name not in _PERMUTES or source is None:
        return None
    if not isinstance(source.meta.get("val"), Tensor):
        return None
    rank = source.meta["val"].dim()
    order = list(range(rank))
    if name == "permute":
        return [axis % rank for axis in argument(node, "dims")]
    if rank < 2:
        return order
    if name in ("t", "mT"):
        first, second = rank - 2, rank - 1
    else:
        first, second = (axis % rank for axis in node.args[1:3])  # type: ignore[operator]
    order[first], order[second] = order[second], order[first]
    return order


def _sum(program: Program, node: fx.Node, name: str) -> Identity | None:
    """x + 0, x - 0 and 0 + x: exact for integers, and for floats if the zero is negative."""
    left, right = node.args[:2]
    alpha = argument(node, "alpha")
    if node.meta["val"].is_complex():
        return None
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha < 0:
        return None
    candidates = [(left, right)] + ([(right, left)] if name == "add" and alpha == 1 else [])
    for source, other in candidates:
        if not isinstance(source, fx.Node) or not _filled_with(program, other, 0):
            continue
        if not same_layout(node, source):
            continue
        exact = not node.meta["val"].is_floating_point() or (
            _sign_is_negative(program, other) == (name == "add")
        )
        obstacle = None if exact else "adding 0 turns -0.0 into 0.0"
        return Identity(source, same_memory=False, obstacle=obstacle)
    return None


def _product(program: Program, node: fx.Node, name: str) -> Identity | None:
    """x * 1, 1 * x and x / 1."""
    if name == "div" and argument(node, "rounding_mode") is not None:
        return None
    left, right = node.args[:2]
    for source, other in [(left, right)] + ([(right, left)] if name == "mul" else []):
        is_neutral = isinstance(source, fx.Node) and _filled_with(program, other, 1)
        if is_neutral and same_layout(node, source):
            return Identity(source, same_memory=False)
    return None


def _boolean(program: Program, node: fx.Node, name: str) -> Identity | None:
    """mask & True and mask | False."""
    if node.meta["val"].dtype != torch.bool:
        return None
    neutral = 1 if "and" in name else 0
    left, right = node.args[:2]
    for source, other in ((left, right), (right, left)):
        is_neutral = isinstance(source, fx.Node) and _filled_with(program, other, neutral)
        if is_neutral and same_layout(node, source):
            return Identity(source, same_memory=False)
    return None


def _choice(program: Program, node: fx.Node, name: str) -> Identity | None:
    """where(condition, x, y) and masked_fill(x, mask, value) with a constant condition."""
    if name == "masked_fill":
        options = [(node.args[1], 0, node.args[0])]
    elif len(node.args) == 3:
        options = [(node.args[0], 1, node.args[1]), (node.args[0], 0, node.args[2])]
    else:
        return None
    for condition, wanted, source in options:
        is_neutral = isinstance(source, fx.Node) and _filled_with(program, condition, wanted)
        if is_neutral and same_layout(node, source):
            return Identity(source, same_memory=False)
    return None


def _filled_with(program: Program, argument: Any, value: int) -> bool:
    """Whether an argument is ``value``, or a weight that holds nothing else."""
    if isinstance(argument, int | float):
        return argument == value
    tensor = program.constant(argument)
    return tensor is not None and tensor.numel() > 0 and bool((tensor == value).all())


def _sign_is_negative(program: Program, argument: Any) -> bool:
    """Whether every zero in an argument is -0.0."""
    tensor = program.constant(argument)
    if tensor is None:
        return math.copysign(1.0, argument) < 0
    return bool(torch.signbit(tensor).all())


def same_layout(left: fx.Node, right: fx.Node) -> bool:
    """Whether two values certainly agree in dtype, device, shape and strides."""
    a, b = left.meta.get("val"), right.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim() or a.layout != b.layout:
        return False
    pairs = [*zip(a.shape, b.shape, strict=True), *zip(a.stride(), b.stride(), strict=True)]
    return all(_equal(x, y) for x, y in pairs)


def _equal(left: Any, right: Any) -> bool:
    return bool(statically_known_true(left == right))


def _aten_name(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.removeprefix("aten::")


_Rule = Callable[[Program, fx.Node, str], Identity | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_RESHAPES | _CASTS, _round_trip),
    **dict.fromkeys(_DROPOUTS | (_COPIES - {"pad", "constant_pad_nd", "cat"}), _unchanged),
    **dict.fromkeys(_PERMUTES, _permutation),
    **dict.fromkeys({"pad", "constant_pad_nd"}, _padding),
    **dict.fromkeys({"add", "sub"}, _sum),
    **dict.fromkeys({"mul", "div"}, _product),
    **dict.fromkeys({"__and__", "bitwise_and", "logical_and", "__or__", "bitwise_or",
                     "logical_or"}, _boolean),
    **dict.fromkeys({"where", "masked_fill"}, _choice),
    "cat": _concatenation,
}  # fmt: skip
