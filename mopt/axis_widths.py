"""How norms let the width shrink that they run over: that of a transformer's residual stream.

An RMS norm over what is left gives what one over all channels does where the others are zero, once
its weight and its epsilon are scaled by the share that is left (the rule of Ashkboos et al. 2024,
"SliceGPT", that a norm goes on dividing by the original width). A layer norm also takes a mean
away, of which that does not hold: its statistics are then over what is left.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from mopt.axes import Keep, Labels, Tracker, find
from mopt.axis_shapes import set_argument
from mopt.effects import argument

_aten = torch.ops.aten
_SQUARES = (_aten.square.default, _aten.pow.Tensor_Scalar)


def norm_over_width(t: Tracker, node: fx.Node, why: str) -> Labels:
    """A fused norm over the last axis."""
    last = len(t.shape(node.args[0])) - 1
    labels = t.commit(t.of(node.args[0]), last, why)
    factor = find(labels, last)
    readers = [one for one in node.args[2:] if isinstance(one, fx.Node)]
    for one in readers:
        own = t.take(one, 0, why)
        if own is not None and factor is not None:
            t.tie(factor.atoms, own)
        elif own is not None or factor is not None:
            t.freeze(own if own is not None else factor.atoms, why)  # type: ignore[union-attr]
    if factor is None:
        return labels
    atoms, is_rms = factor.atoms, node.target is _aten.rms_norm.default

    def rewrite(keep: Keep) -> None:
        left = int(keep(atoms).sum())
        if left == len(atoms):
            return
        set_argument(node, "normalized_shape", [left])
        if not is_rms:
            return
        share = left / len(atoms)
        eps = argument(node, "eps")
        dtype = node.meta["val"].dtype
        set_argument(node, "eps", (torch.finfo(dtype).eps if eps is None else eps) / share)
        reader = argument(node, "weight")
        weight = t.program.constant(reader)
        scaled = torch.ones(left, dtype=dtype) if weight is None else weight
        name = reader.target if isinstance(reader, fx.Node) else f"{node.name}.weight"
        stored = t.program.add_weight(f"{name}_scaled", scaled * share**-0.5, node)
        set_argument(node, "weight", stored)
        if isinstance(reader, fx.Node) and not reader.users:
            t.program.graph.erase_node(reader)

    t.rewrites.append(rewrite)
    return labels


def is_mean_square(node: fx.Node) -> bool:
    """Whether a call is the mean over the last axis of squares, kept as an axis of one."""
    if node.target is not _aten.mean.dim or not argument(node, "keepdim"):
        return False
    source = node.args[0]
    rank = len(source.meta["val"].shape) if isinstance(source, fx.Node) else 0
    squares = isinstance(source, fx.Node) and source.target in _SQUARES
    if squares and source.target is _SQUARES[1]:  # type: ignore[union-attr]
        squares = source.args[1] == 2  # type: ignore[union-attr]
    return squares and [axis % rank for axis in argument(node, "dim") or []] == [rank - 1]


def mean_over_width(t: Tracker, node: fx.Node, why: str) -> Labels:
    """The mean square of an RMS norm that is written out: zeros count in it, as before."""
    last = len(t.shape(node.args[0])) - 1
    labels = t.commit(t.of(node.args[0]), last, why)
    factor = find(labels, last)
    if factor is not None:
        atoms = factor.atoms

        def rewrite(keep: Keep) -> None:
            share = int(keep(atoms).sum()) / len(atoms)
            if math.isclose(share, 1.0):
                return
            graph = t.program.graph
            with graph.inserting_after(node):
                scaled = graph.call_function(_aten.mul.Tensor, (node, share))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
            scaled.meta.update({k: node.meta[k] for k in ("nn_module_stack", "stack_trace")
                                if k in node.meta})  # fmt: skip

        t.rewrites.append(rewrite)
    return tuple(own for own in labels if last not in own.axes)
