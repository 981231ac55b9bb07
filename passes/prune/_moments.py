"""Statistics of channels brought back to what they were: batch norms, also folded ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mopt.effects import argument
from mopt.layers import CONVOLUTIONS
from mopt.pass_base import PassContext
from mopt.program import Program
from mopt.streaming import Stream

_aten = torch.ops.aten
_NORMS = (_aten.batch_norm.default, _aten._native_batch_norm_legit_no_training.default)
# A channel that varies less than this, relative to its size, is as good as constant.
_STILL = 1e-6


def restore_moments(
    program: Program, original: Program, kept: Mapping[str, Any], ctx: PassContext
) -> int:
    """Give channels the means and variances that batch norms are there for; how many layers.

    A batch norm gets the statistics of what it now reads on the calibration data. Where norms were
    folded into convolutions, each channel is scaled and shifted to the mean and the variance that
    it has in ``original``, which is what the norm would do. One layer after another, on what the
    layers before it give now. ``kept`` has the channels that calls still write, by node name.
    """
    assert ctx.calibration is not None
    norms = [node for node in program.graph.nodes if node.target in _NORMS]
    if norms:
        return _restore_norms(program, norms, ctx)
    theirs = {node.name: node for node in original.graph.nodes}
    calls = [
        node for node in program.graph.nodes
        if node.target in CONVOLUTIONS and node.name in theirs
        and program.constant(node.args[1]) is not None
        and program.constant(argument(node, "bias")) is not None
        and len(node.args[1].users) == 1 and len(node.args[2].users) == 1  # type: ignore[union-attr]
    ]  # fmt: skip
    if not calls:
        return 0
    stream = Stream(program, ctx.calibration.for_part(program), ctx)
    reference = Stream(original, ctx.calibration.for_part(original), ctx)
    fresh: list[tuple[fx.Node, Tensor, Tensor]] = []
    for call in calls:
        twin = theirs[call.name]
        source = call.args[0]
        assert isinstance(source, fx.Node)
        stream.advance(call)
        reference.advance(twin.next)
        weight, bias = (program.weight(call.args[at]) for at in (1, 2))  # type: ignore[arg-type]
        run: Any = call.target
        now = [run(value, weight, bias, *call.args[3:]) for value in stream.values(source)]
        mean, variance = channel_moments(now)
        wanted, spread = channel_moments(reference.values(twin))
        if call.name in kept:
            places = torch.as_tensor(kept[call.name])
            wanted, spread = wanted[places], spread[places]
        moving = (variance > _STILL * mean.square()) & (variance > 0) & (spread > 0)
        scale = torch.where(moving, (spread / variance.clamp(min=1e-30)).sqrt(), 1.0)
        axis = 1 if "transpose" in str(call.target) else 0
        if len(scale) != weight.shape[axis]:
            continue  # groups of a transposed convolution share their weights' columns
        shape = [-1 if own == axis else 1 for own in range(weight.dim())]
        new = (weight.double() * scale.view(shape)).to(weight.dtype)
        offset = ((bias.double() - mean) * scale + wanted).to(bias.dtype)
        fresh.append((call, new, offset))
        stream.replace_weight([call], call.args[1], new)  # type: ignore[arg-type]
        stream.replace_weight([call], call.args[2], offset)  # type: ignore[arg-type]
    for call, new, offset in fresh:
        for at, tensor in ((1, new), (2, offset)):
            _store(program, call, at, tensor)
    program.refresh()
    return len(fresh)


def channel_moments(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of the channels (axis 1) over all batches and places, float64."""
    rows = [value.detach().movedim(1, -1).flatten(0, -2).double() for value in values]
    count = sum(len(one) for one in rows)
    mean = torch.stack([one.sum(0) for one in rows]).sum(0) / count
    variance = torch.stack([(one - mean).square().sum(0) for one in rows]).sum(0) / count
    return mean, variance


def _restore_norms(program: Program, norms: list[fx.Node], ctx: PassContext) -> int:
    assert ctx.calibration is not None
    stream = Stream(program, ctx.calibration.for_part(program), ctx)
    found: list[tuple[fx.Node, int, Tensor]] = []
    for node in norms:
        stream.advance(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        for at, value in zip((3, 4), channel_moments(stream.values(source)), strict=True):
            reader = node.args[at]
            old = program.constant(reader)
            if old is not None:
                fresh = value.to(old.dtype)
                stream.replace_weight([node], reader, fresh)  # type: ignore[arg-type]
                found.append((node, at, fresh))
    for node, at, fresh in found:
        _store(program, node, at, fresh)
    program.refresh()
    return len(norms)


def _store(program: Program, call: fx.Node, at: int, tensor: Tensor) -> None:
    old = call.args[at]
    assert isinstance(old, fx.Node)
    call.update_arg(at, program.add_weight(f"{old.target}_moments", tensor, call))
    if not old.users:
        program.graph.erase_node(old)
