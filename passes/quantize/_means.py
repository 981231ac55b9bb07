"""How much rounding a weight moves the mean of a layer's output, measured on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from mopt.effects import argument
from mopt.formats.base import row_pieces
from mopt.layers import LINEAR, Layer
from mopt.machine import trim_heap
from mopt.observers import Observer
from mopt.pass_base import PassContext
from mopt.passes.quantize._pairs import channel_axis, replace_argument
from mopt.program import Program

# Some rows of what rounding adds to a layer's weight.
Change = Callable[[slice], Tensor]


class OutputShift:
    """The mean per channel of what a call gives for the change of its weight alone."""

    def __init__(self, call: fx.Node, change: Change) -> None:
        self._call, self._change = call, change
        self._sum, self._count = torch.zeros(()), 0

    def add(self, value: Tensor) -> bool:
        """Take in a batch of the call's input; False if it holds NaN or infinity."""
        if not bool(torch.isfinite(value).all()):
            return False
        rows = value.detach().flatten(0, -2)
        if self._call.target not in LINEAR:
            rest, kwargs = self._call.args[3:], dict(self._call.kwargs)
            kwargs.pop("bias", None)
            change = self._change(slice(None))
            with torch.no_grad():
                given = self._call.target(value, change, None, *rest, **kwargs)  # type: ignore[operator]
            rows = given.movedim(channel_axis(self._call), -1).flatten(0, -2)
        self._sum = self._sum + rows.sum(0, dtype=torch.float64)
        self._count += len(rows)
        return True

    def mean(self, weight: Tensor) -> Tensor:
        """(channels), float64, for a layer of that weight."""
        mean = self._sum / max(self._count, 1)
        if self._call.target not in LINEAR:
            return mean
        # Filled in place: small results kept between large pieces would scatter over the heap.
        moved = torch.empty(len(weight), dtype=torch.float64, device=weight.device)
        for at in row_pieces(weight):
            moved[at] = self._change(at).double() @ mean
        return moved


class _Several:
    """Observers of one value."""

    def __init__(self) -> None:
        self.members: list[Observer] = []

    def add(self, value: Tensor) -> bool:
        return all([member.add(value) for member in self.members])


def correct_means(program: Program, ctx: PassContext, changes: Mapping[Layer, Change]) -> int:
    """Take the mean of (W' - W) x off each layer's bias; the number of layers it was done for.

    ``changes`` gives W' - W, some rows at a time. x is what the layer reads in the program as it
    is: where all layers are corrected, means are what they were there (Nagel et al. 2019,
    "Data-Free Quantization", section 4.2, with the padding of convolutions taken into account).
    Layers that are called several times are left out.
    """
    assert ctx.calibration is not None
    observers: dict[fx.Node, _Several] = {}
    shifts: dict[fx.Node, OutputShift] = {}
    for layer, change in changes.items():
        call = layer.calls[0]
        bias = argument(call, "bias")
        if len(layer.calls) != 1 or (bias is not None and program.constant(bias) is None):
            continue
        source = call.args[0]
        assert isinstance(source, fx.Node)
        shifts[call] = OutputShift(call, change)
        observers.setdefault(source, _Several()).members.append(shifts[call])
    ctx.calibration.for_part(program).collect({**observers}, ctx)
    for call, shift in shifts.items():
        bias, weight = program.constant(argument(call, "bias")), program.constant(call.args[1])
        assert weight is not None
        moved = shift.mean(weight)
        total = -moved if bias is None else bias.double() - moved
        replace_argument(program, call, 2, total, "corrected")
        trim_heap()
    return len(shifts)
