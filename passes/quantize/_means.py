"""How much rounding a weight moves the mean of a layer's output, measured on calibration data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from mopt.effects import argument
from mopt.layers import Layer
from mopt.observers import Observer
from mopt.pass_base import PassContext
from mopt.passes.quantize._pairs import channel_axis, replace_argument
from mopt.program import Program


class OutputShift:
    """The mean per channel of what a call gives for the change of its weight alone."""

    def __init__(self, call: fx.Node, change: Tensor) -> None:
        self._call, self._change = call, change
        self._sum, self._count = torch.zeros(()), 0

    def add(self, value: Tensor) -> bool:
        """Take in a batch of the call's input; False if it holds NaN or infinity."""
        if not bool(torch.isfinite(value).all()):
            return False
        with torch.no_grad():
            rest, kwargs = self._call.args[3:], dict(self._call.kwargs)
            kwargs.pop("bias", None)
            given = self._call.target(value, self._change, None, *rest, **kwargs)  # type: ignore[operator]
        rows = given.movedim(channel_axis(self._call), -1).flatten(0, -2).double()
        self._sum, self._count = self._sum + rows.sum(0), self._count + len(rows)
        return True

    @property
    def mean(self) -> Tensor:
        """(channels), float64."""
        return self._sum / max(self._count, 1)


class _Several:
    """Observers of one value."""

    def __init__(self) -> None:
        self.members: list[Observer] = []

    def add(self, value: Tensor) -> bool:
        return all([member.add(value) for member in self.members])


def correct_means(program: Program, ctx: PassContext, rounded: Mapping[Layer, Tensor]) -> int:
    """Take the mean of (W' - W) x off each layer's bias; the number of layers it was done for.

    x is what the layer reads in the program as it is: where all layers are corrected, means are
    what they were there (Nagel et al. 2019, "Data-Free Quantization", section 4.2, with the padding
    of convolutions taken into account). Layers that are called several times are left out.
    """
    assert ctx.calibration is not None
    observers: dict[fx.Node, _Several] = {}
    shifts: dict[fx.Node, OutputShift] = {}
    for layer, weight in rounded.items():
        call = layer.calls[0]
        bias = argument(call, "bias")
        if len(layer.calls) != 1 or (bias is not None and program.constant(bias) is None):
            continue
        source = call.args[0]
        assert isinstance(source, fx.Node)
        shifts[call] = OutputShift(call, weight - program.weight(layer.weight))
        observers.setdefault(source, _Several()).members.append(shifts[call])
    ctx.calibration.for_part(program).collect({**observers}, ctx)
    for call, shift in shifts.items():
        bias = program.constant(argument(call, "bias"))
        total = -shift.mean if bias is None else bias.double() - shift.mean
        replace_argument(program, call, 2, total, "corrected")
    return len(shifts)
