"""Ways to run an operator so that its one result lands in memory that was given to it.

Each is a function of the operator, the place and the arguments. None is trusted by its name: a way
is used for a call only after it gave the plain call's result bit for bit (see ``recorder.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten
# Made for one operator: takes the place and then the operator's arguments.
Prepared = Callable[..., Any]


@cache
def out_overload(target: OpOverload) -> OpOverload | None:
    """The overload with the same arguments that writes to ``out``, if there is one."""
    packet = target.overloadpacket
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments]
    for name in packet.overloads():
        arguments = getattr(packet, name)._schema.arguments
        outs = [a for a in arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in arguments if not a.is_out]
        if len(outs) == 1 and rest == wanted:
            found: OpOverload = getattr(packet, name)
            return found
    return None


def _out(target: OpOverload) -> Prepared | None:
    overload = out_overload(target)
    if overload is None:
        return None
    keyword = next(a.name for a in overload._schema.arguments if a.is_out)

    def run(out: Tensor, *args: Any, **kwargs: Any) -> None:
        overload(*args, **kwargs, **{keyword: out})

    return run


def _relu(target: OpOverload) -> Prepared | None:
    def run(out: Tensor, x: Tensor) -> None:
        aten.clamp_min.out(x, 0, out=out)

    return run if target is aten.relu.default else None


def _linear(target: OpOverload) -> Prepared | None:
    def run(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        rows, places = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if bias is None:
            aten.mm.out(rows, weight.t(), out=places)
        else:
            aten.addmm.out(bias, rows, weight.t(), out=places)

    return run if target is aten.linear.default else None


def _batch_norm(target: OpOverload) -> Prepared | None:
    empty = torch.empty(0)

    def run(
        out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
        variance: Tensor | None, training: bool, momentum: float, eps: float, cudnn: bool = True,
    ) -> None:  # fmt: skip
        aten.native_batch_norm.out(
            x, weight, bias, mean, variance, training, momentum, eps,
            out=out, save_mean=empty, save_invstd=empty,
        )  # fmt: skip

    return run if target is aten.batch_norm.default else None


def _softmax(target: OpOverload) -> Prepared | None:
    def run(out: Tensor, x: Tensor, dim: int, dtype: torch.dtype | None = None) -> None:
        aten._softmax.out(x, dim, False, out=out)

    return run if target is aten.softmax.int else None


def _max_pool2d(target: OpOverload) -> Prepared | None:
    def run(out: Tensor, x: Tensor, *args: Any) -> None:
        form = torch.channels_last if out.is_contiguous(memory_format=torch.channels_last) else (
            torch.contiguous_format
        )  # fmt: skip
        indices = torch.empty(out.shape, dtype=torch.int64, memory_format=form)
        aten.max_pool2d_with_indices.out(x, *args, out=out, indices=indices)

    return run if target is aten.max_pool2d.default else None


def _embedding(target: OpOverload) -> Prepared | None:
    def run(out: Tensor, table: Tensor, index: Tensor, *options: Any) -> None:
        aten.index_select.out(table, 0, index.reshape(-1), out=out.view(-1, out.shape[-1]))

    return run if target is aten.embedding.default else None


def _copied(target: OpOverload) -> Prepared | None:
    """Operators that copy elements, where they do not give a view."""

    def run(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        (out if out.shape == x.shape else out.view(x.shape)).copy_(x)

    copying = {
        aten.clone.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default,
        aten.reshape.default, aten.flatten.using_ints, aten.to.dtype_layout,
    }  # fmt: skip
    return run if target in copying else None


def _conv2d(target: OpOverload) -> Prepared | None:
    """oneDNN's convolution added to zeros: only its in-place form takes a place."""
    if target is not aten.conv2d.default or not hasattr(torch.ops.mkldnn, _ADD_TO):
        return None
    add_to = getattr(torch.ops.mkldnn, _ADD_TO).binary

    def run(
        out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = (1, 1),
        padding: Any = (0, 0), dilation: Any = (1, 1), groups: int = 1,
    ) -> None:  # fmt: skip
        out.zero_()
        add_to(out, x, weight, bias, padding, stride, dilation, groups, "add", 1.0, None, [], None)

    return run


_ADD_TO = "_convolution_pointwise_"


def _pack_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = (1, 1),
    padding: Any = (0, 0), dilation: Any = (1, 1), groups: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments with the weight in the layout the kernel wants: else every run makes it."""
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, list(x.shape)
    )
    return x, packed, bias, stride, padding, dilation, groups


@dataclass(frozen=True)
class Way:
    """A way to run an operator in given memory.

    ``prepare`` gives the function for an operator, None where it does not suit. ``pack`` changes
    the arguments once, before the first run; the weight at ``packed_argument`` must be constant.
    """

    prepare: Callable[[OpOverload], Prepared | None]
    pack: Callable[..., tuple[Any, ...]] | None = None
    packed_argument: int = 1


WAYS: dict[str, Way] = {
    "out": Way(_out), "relu": Way(_relu), "linear": Way(_linear),
    "batch-norm": Way(_batch_norm), "softmax": Way(_softmax), "max-pool2d": Way(_max_pool2d),
    "embedding": Way(_embedding), "copied": Way(_copied), "conv2d": Way(_conv2d),
    "conv2d-packed": Way(_conv2d, _pack_conv2d),
}  # fmt: skip


def ways(target: Any) -> Iterator[tuple[str, Way, Prepared]]:
    """The named ways that may suit an operator, with its function for each."""
    if isinstance(target, OpOverload):
        for name, way in WAYS.items():
            run = way.prepare(target)
            if run is not None:
                yield name, way, run
