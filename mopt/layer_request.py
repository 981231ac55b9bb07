"""What to ask a cost model about a layer of a program, at its own widths or at others."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import fx

from mopt.cost import CostModel, LayerRequest
from mopt.effects import argument
from mopt.flops import shape_of
from mopt.layers import LINEAR


def layer_request(call: fx.Node, shape: Sequence[int], groups: int | None = None) -> LayerRequest:
    """One call of a linear layer or convolution with a weight of ``shape``, on the example inputs.

    ``groups`` of a convolution are its own unless given.
    """
    written = shape_of(call.meta["val"])
    if call.target in LINEAR:
        bias = {"bias": argument(call, "bias") is not None}
        return LayerRequest("linear", tuple(shape), rows=prod(written[:-1]), geometry=bias)
    stride: Any = argument(call, "stride")
    spatial = len(written) - 2
    if not isinstance(stride, int):
        stride = tuple(stride) * (spatial if len(stride) == 1 else 1)
    geometry = {
        "batch": written[0],
        "output": tuple(written[2:]),
        "stride": stride,
        "groups": groups or int(argument(call, "groups")),
        "transposed": "transpose" in str(call.target),
    }
    rows = written[0] * prod(written[2:])
    return LayerRequest("convolution", tuple(shape), rows=rows, geometry=geometry)


def milliseconds(model: CostModel, request: LayerRequest) -> float:
    """The estimate for one request."""
    return model.layer_cost(
        request.kind, request.shape, request.weight_format, rows=request.rows,
        geometry=request.geometry, sharers=request.sharers,
    ).milliseconds  # fmt: skip


def preferred_multiple(model: CostModel, kind: str) -> int:
    """The step of widths at which a layer of that kind gets cheaper on the device, 8 to 64.

    Kernels compute whole blocks of channels: between two multiples of a block nothing is gained.
    """
    width, rows = 256, 784
    geometry = {"batch": 1, "output": (28, 28), "stride": 1, "groups": 1}
    tail = (256,) if kind == "linear" else (256, 3, 3)

    def cost(outputs: int) -> float:
        shape = (outputs, *tail)
        asked = LayerRequest(
            kind, shape, rows=rows, geometry=None if kind == "linear" else geometry
        )
        return milliseconds(model, asked)

    whole = cost(width)
    for step in (8, 16, 32, 64):
        if cost(width - step) <= whole * (1 - 0.5 * step / width):
            return step
    return 64
