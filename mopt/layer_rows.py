"""What the outputs of a layer are linear in: its inputs, or the patches a convolution sees."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mopt.effects import argument
from mopt.layers import LINEAR


def input_width(weight: Tensor) -> int:
    """How many numbers each output of a layer is a sum over."""
    return weight[0].numel()


def input_rows(call: fx.Node, weight: Tensor, value: Tensor, most: int | None = None) -> Tensor:
    """Rows of what a linear layer or an ungrouped 2-D convolution reads, (rows, input width).

    They are in the order of :func:`output_rows`; with ``most`` at most about so many of them are
    taken, evenly spread.
    """
    if call.target in LINEAR:
        rows = value.reshape(-1, value.shape[-1])
        return rows[:: _step(len(rows), most)]
    stride, padding, dilation = (argument(call, name) for name in ("stride", "padding", "dilation"))
    patches = F.unfold(value, tuple(weight.shape[2:]), dilation, padding, stride)
    patches = patches[:, :, :: _step(len(patches) * patches.shape[-1], most)]
    return patches.movedim(1, -1).reshape(-1, patches.shape[1])


def output_rows(call: fx.Node, value: Tensor, most: int | None = None) -> Tensor:
    """The rows of a layer's output that belong to those inputs, (rows, outputs)."""
    if call.target in LINEAR:
        rows = value.reshape(-1, value.shape[-1])
        return rows[:: _step(len(rows), most)]
    flat = value.flatten(2)
    flat = flat[:, :, :: _step(len(flat) * flat.shape[-1], most)]
    return flat.movedim(1, -1).reshape(-1, flat.shape[1])


def _step(rows: int, most: int | None) -> int:
    return 1 if most is None else max(1, -(-rows // most))


def can_read_rows(call: fx.Node) -> str | None:
    """Why the inputs of a call cannot be laid out as rows, or None."""
    if call.target in LINEAR:
        return None
    if call.target is not torch.ops.aten.conv2d.default:
        return "only linear layers and 2-D convolutions are fitted to data"
    if argument(call, "groups") != 1:
        return "its groups read different inputs"
    return None
