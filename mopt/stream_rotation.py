"""Turn a transformer's residual stream to its principal axes; the outputs stay what they are.

An RMS norm without a scale commutes with rotations, so all that writes a stream and all that reads
it can be multiplied by one orthogonal matrix (Ashkboos et al. 2024, "SliceGPT: Compress Large
Language Models by Deleting Rows and Columns", section 3.1). Afterwards few channels carry most of
it, and the others can go. One matrix serves the whole stream: the paper has one per block, and two
more products per block to go from each to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, fx

from mopt.axes import Factor
from mopt.coupling import Coupling, Group, Member, find_coupling
from mopt.layers import LINEAR
from mopt.moments import ChannelMoments
from mopt.pass_base import PassContext, Skip
from mopt.program import Program

_aten = torch.ops.aten
_NORM = _aten.rms_norm.default
_TABLE = _aten.embedding.default
# What carries a stream without looking at single channels.
_CARRIES = (
    *LINEAR, _NORM, _TABLE, _aten.add.Tensor, _aten.dropout.default, _aten.clone.default,
    _aten.contiguous.default, _aten.detach.default,
)  # fmt: skip
_MOST_ROWS = 4096


def rotate_streams(
    program: Program, ctx: PassContext, wanted: Callable[[Group], bool] = lambda group: True
) -> tuple[dict[str, list[str]], list[Skip]]:
    """Rotate the wanted residual streams of a program in place.

    The axes are those of what the norms give on the calibration data, largest first. Returns by the
    path of each stream's group the names of the calls that write it, and why others are not turned.
    """
    assert ctx.calibration is not None
    found = find_coupling(program, through_norms=True)
    streams, skips = [], []
    for group in found.groups:
        if group.kind != "stream channels" or not wanted(group):
            continue
        why = _obstacle(found, group)
        if why is None:
            streams.append(group)
        else:
            skips.append(Skip(group.path, f"its stream is not rotated: {why}"))
    norms = {group: _norms(group) for group in streams}
    for group in streams:
        _fold_scales(program, group)
    program.refresh()
    observers = {norm: ChannelMoments(-1, _MOST_ROWS) for group in streams for norm in norms[group]}
    if observers:
        ctx.calibration.for_part(program).collect(observers, ctx)
    for group in streams:
        second = sum((observers[norm].second for norm in norms[group]), torch.zeros(()))
        _, axes = torch.linalg.eigh(second)
        _turn(program, group, axes.flip(1))
    program.refresh()
    writers = {
        group.path: [member.call.name for member in group.of_role("out")] for group in streams
    }
    return writers, skips


def _obstacle(found: Coupling, group: Group) -> str | None:
    """Why a stream cannot be rotated, None if it can."""
    seen = []
    for member in group.members:
        call = member.call
        if (member.units < 0).any() or len(set(member.units.tolist())) != len(member.units):
            return f"{call.name} has other channels beside it"
        if member.role == "in" and (call.target not in LINEAR or call.args[0].target is not _NORM):  # type: ignore[union-attr]
            return f"{call.name} reads it without an RMS norm"
        seen.append(found.tracker.program.weight(member.weight).untyped_storage().data_ptr())
    if len(set(seen)) != len(seen):
        return "two layers share a weight"
    own = set(group.units.tolist())
    readers = {member.call for member in group.of_role("in")}
    for node, labels in found.tracker.labels.items():
        for factor in labels if isinstance(labels, tuple) else ():
            if not isinstance(factor, Factor) or own.isdisjoint(
                np.unique(found.unit_of[factor.atoms]).tolist()
            ):
                continue
            if node.target not in _CARRIES:
                return f"{node.target} looks at single channels"
            if node.target is _NORM and not set(node.users) <= readers:
                return f"what {node.name} gives is read by more than linear layers"
            if node.target is _aten.add.Tensor and any(
                not isinstance(one, fx.Node) or one.op == "get_attr" for one in node.args
            ):
                return f"{node.name} adds a constant"
    return None


def _norms(group: Group) -> list[fx.Node]:
    """The norms over a stream, once each."""
    found = [member.call.args[0] for member in group.of_role("in")]
    return list(dict.fromkeys(one for one in found if isinstance(one, fx.Node)))


def _fold_scales(program: Program, group: Group) -> None:
    """Move the scales of norms into the layers behind them."""
    for member in group.of_role("in"):
        norm = member.call.args[0]
        scale = program.constant(norm.args[2] if len(norm.args) > 2 else None)  # type: ignore[union-attr]
        if scale is not None:
            weight = program.weight(_reader(member)).double()
            _store(program, member, weight * scale.double(), "scaled")
    for norm in _norms(group):
        scale = norm.args[2] if len(norm.args) > 2 else None
        if isinstance(scale, fx.Node):
            ones = torch.ones_like(program.weight(scale))
            norm.update_arg(2, program.add_weight(f"{scale.target}_one", ones, norm))
            _drop([scale], program)


def _turn(program: Program, group: Group, axes: Tensor) -> None:
    for member in group.members:
        if member.call.target is _NORM:
            continue
        weight = program.weight(_reader(member)).double()
        turned = axes.t() @ weight if member.role == "out" else weight @ axes
        _store(program, member, turned, "turned")


def _reader(member: Member) -> fx.Node:
    """The node that reads a member's tensor now, after earlier edits."""
    at = 0 if member.call.target is _TABLE else 2 if member.weight.meta["val"].dim() == 1 else 1
    reader = member.call.args[at]
    assert isinstance(reader, fx.Node)
    return reader


def _store(program: Program, member: Member, tensor: Tensor, how: str) -> None:
    old = _reader(member)
    fresh = program.add_weight(
        f"{old.target}_{how}", tensor.to(program.weight(old).dtype), member.call
    )
    member.call.replace_input_with(old, fresh)
    _drop([old], program)


def _drop(readers: Iterable[fx.Node], program: Program) -> None:
    for reader in readers:
        if not reader.users:
            program.graph.erase_node(reader)
