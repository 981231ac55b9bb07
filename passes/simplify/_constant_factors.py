"""Calls that scale or shift a value by a constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mopt.effects import argument
from mopt.program import Program

_aten = torch.ops.aten


@dataclass(frozen=True)
class Factors:
    """``node`` computes ``source * scale + shift``; both constants are float64 and broadcast."""

    node: fx.Node
    source: fx.Node
    scale: Tensor
    shift: Tensor

    @property
    def is_number(self) -> bool:
        """Whether both constants are single numbers."""
        return self.scale.numel() == 1 and self.shift.numel() == 1

    @property
    def is_on_last_axis(self) -> bool:
        """Whether neither constant varies along another axis than the last."""
        return all(t.numel() == 1 or t.numel() == t.shape[-1] for t in (self.scale, self.shift))

    def per_channel(self, axis: int, channels: int) -> tuple[Tensor, Tensor] | None:
        """Scale and shift with one element, or one per channel along ``axis`` (negative).

        None if a constant varies along another axis.
        """
        found = []
        for tensor in (self.scale, self.shift):
            if tensor.numel() > 1:
                if tensor.dim() < -axis or tensor.shape[axis] != tensor.numel():
                    return None
                if tensor.numel() != channels:
                    return None
            found.append(tensor.reshape(-1))
        return found[0], found[1]

    def problem(self) -> str | None:
        """Why these constants cannot be folded anywhere, or None."""
        if not bool(torch.isfinite(self.scale).all() and torch.isfinite(self.shift).all()):
            return "its constant is NaN or infinite"
        if not bool(self.scale.all()):
            return "its scale holds 0, which turns infinity into NaN only where it is now"
        return None


def constant_factors(program: Program, node: fx.Node) -> Factors | None:
    """The scale and the shift a call applies, if its value has the shape and dtype of its input."""
    if node.op != "call_function" or node.kwargs.get("rounding_mode") is not None:
        return None
    found = _parse(program, node)
    if found is None or not isinstance(found.source.meta.get("val"), Tensor):
        return None
    before, after = found.source.meta["val"], node.meta["val"]
    if before.dtype != after.dtype or not after.is_floating_point() or before.dim() != after.dim():
        return None
    pairs = zip(before.shape, after.shape, strict=True)
    return found if all(statically_known_true(a == b) for a, b in pairs) else None


def _parse(program: Program, node: fx.Node) -> Factors | None:
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if node.target is _aten.neg.default and isinstance(node.args[0], fx.Node):
        return Factors(node, node.args[0], -one, zero)
    if node.target not in _BINARY:
        return None
    left, right = node.args[:2]
    if node.target in _REVERSED:
        left, right = right, left
    a, b = _constant(program, left), _constant(program, right)
    if (a is None) == (b is None):
        return None
    source = left if a is None else right
    if not isinstance(source, fx.Node):
        return None
    alpha = argument(node, "alpha")
    factor = float(1 if alpha is None else alpha)
    name = _BINARY[node.target]
    if name == "mul":
        constant = a if b is None else b
        assert constant is not None
        return Factors(node, source, constant, zero)
    if name == "div":
        return Factors(node, source, 1 / b, zero) if b is not None else None
    sign = -factor if name == "sub" else factor  # left + sign * right
    if b is not None:
        return Factors(node, source, one, b * sign)
    assert a is not None
    return Factors(node, source, one * sign, a)


def _constant(program: Program, argument: Any) -> Tensor | None:
    if isinstance(argument, int | float) and not isinstance(argument, bool):
        return torch.tensor(float(argument), dtype=torch.float64)
    tensor = program.constant(argument)
    if tensor is None or tensor.is_complex() or tensor.dtype == torch.bool:
        return None
    return tensor.double()


_BINARY: dict[Any, str] = {
    _aten.mul.Tensor: "mul", _aten.mul.Scalar: "mul", _aten.div.Tensor: "div",
    _aten.div.Scalar: "div", _aten.add.Tensor: "add", _aten.add.Scalar: "add",
    _aten.sub.Tensor: "sub", _aten.sub.Scalar: "sub", _aten.rsub.Scalar: "sub",
    _aten.rsub.Tensor: "sub",
}  # fmt: skip
_REVERSED = (_aten.rsub.Scalar, _aten.rsub.Tensor)
