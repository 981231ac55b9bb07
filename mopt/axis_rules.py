"""How operators that compute tie the atoms of their operands."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from mopt.axes import Array, Factor, Keep, Labels, Tracker, find
from mopt.axis_recurrent import lstm
from mopt.axis_shapes import SHAPE_RULES, Result, Rule, axis_of, item, set_argument
from mopt.axis_widths import is_mean_square, mean_over_width, norm_over_width
from mopt.effects import argument
from mopt.layers import CONVOLUTIONS

_RULES: dict[str, Rule] = {**SHAPE_RULES, "lstm": lstm}

_ELEMENTWISE = {
    "add", "sub", "mul", "div", "where", "masked_fill", "maximum", "minimum", "pow", "relu",
    "relu6", "silu", "gelu", "selu", "elu", "celu", "mish", "hardswish", "hardsigmoid",
    "hardtanh", "sigmoid", "tanh", "softplus", "softsign", "leaky_relu", "clamp", "clip",
    "square", "rsub", "abs", "floor_divide", "logical_not", "to", "_to_copy", "type_as",
    "contiguous", "clone", "detach", "alias", "dropout", "alpha_dropout", "feature_dropout",
    "lift_fresh_copy", "float", "addcmul", "addcdiv", "lerp", "threshold", "hardshrink",
    "softshrink", "tanhshrink", "log_sigmoid", "fill", "zeros_like", "ones_like", "full_like",
    "rrelu",
}  # fmt: skip
# Value: how many of the last axes are mixed.
_SPATIAL = {
    "max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3, "avg_pool1d": 1, "avg_pool2d": 2,
    "avg_pool3d": 3, "adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3,
    "adaptive_max_pool1d": 1, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3,
    "max_pool2d_with_indices": 2, "upsample_nearest1d": 1, "upsample_nearest2d": 2,
    "upsample_nearest3d": 3, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2,
    "upsample_linear1d": 1, "upsample_trilinear3d": 3, "_adaptive_avg_pool2d": 2,
}  # fmt: skip
_ALONG = {
    "softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "flip", "roll",
    "sort", "topk", "index_select",
}  # fmt: skip
_REDUCE = {
    "mean", "sum", "amax", "amin", "var", "std", "prod", "any", "all", "logsumexp", "argmax",
    "argmin", "max", "min", "norm", "linalg_vector_norm", "var_mean",
}  # fmt: skip


def apply_rule(t: Tracker, node: fx.Node, why: str) -> Result:
    """The labels of a call's value; what its rule does not know stays as it is."""
    if node.target is operator.getitem:
        return item(t, node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return _unknown(t, node, why)
    name = node.target._schema.name.removeprefix("aten::")
    rule = _RULES.get(name.removesuffix("_")) or _RULES.get(name)
    if rule is not None:
        return rule(t, node, why)
    if torch.Tag.pointwise in node.target.tags:
        return _elementwise(t, node, why)
    return _unknown(t, node, why)


def _rule(*names: str) -> Any:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _unknown(t: Tracker, node: fx.Node, why: str) -> Result:
    for source in node.all_input_nodes:
        found = t.labels.get(source, ())
        for labels in found if isinstance(found, list) else [found]:
            t.freeze_all(labels, why)
        if source.op == "get_attr":
            t.freeze_all(t.of(source), why)
    return ()


@_rule(*_ELEMENTWISE)
def _elementwise(t: Tracker, node: fx.Node, why: str) -> Result:
    sources = [one for one in node.all_input_nodes if t.shape(one)]
    rank = len(t.shape(node))
    operands = [(t.of(one), t.shape(one)) for one in sources]
    if any(len(shape) > rank for _, shape in operands):
        return _unknown(t, node, why)
    return t.broadcast(operands, rank, why)


@_rule("linear")
def _linear(t: Tracker, node: fx.Node, why: str) -> Result:
    x, weight = node.args[:2]
    labels, shape = t.of(x), t.shape(x)
    last = len(shape) - 1
    if len(t.shape(weight)) != 2:
        return _unknown(t, node, why)
    labels = t.first_axes(labels, why)
    inputs, outputs = t.take_both(weight, why)
    factor = find(labels, last)
    labels = _meet(t, labels, factor, last, inputs, why)
    bias = argument(node, "bias")
    _share(t, outputs, bias, 0, why)
    rest = tuple(own for own in labels if last not in own.axes)
    return rest if outputs is None else (*rest, Factor((last,), outputs))


def _meet(
    t: Tracker, labels: Labels, factor: Factor | None, axis: int, other: Array | None, why: str
) -> Labels:
    """A contraction: both sides lose the same positions, or none."""
    if factor is not None and other is not None:
        t.tie(factor.atoms, other)
        return labels
    if other is not None:
        t.freeze(other, why)
    return t.fix(labels, axis, why) if factor is not None else labels


def _share(t: Tracker, atoms: Array | None, argument: Any, axis: int, why: str) -> None:
    """A stored vector that goes with the atoms of an axis."""
    if not isinstance(argument, fx.Node):
        return
    own = t.take(argument, axis, why)
    if own is not None and atoms is not None:
        t.tie(atoms, own)
    elif own is not None or atoms is not None:
        t.freeze(own if own is not None else atoms, why)  # type: ignore[arg-type]


@_rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(t: Tracker, node: fx.Node, why: str) -> Result:
    x, weight = node.args[:2]
    if node.target not in CONVOLUTIONS or len(t.shape(x)) != len(t.shape(weight)):
        return _unknown(t, node, why)
    labels = t.commit(t.of(x), 1, why)
    for axis in range(2, len(t.shape(x))):
        labels = t.fix(labels, axis, why)
    rest = tuple(factor for factor in labels if 1 not in factor.axes)
    inputs = find(labels, 1)
    transposed = "transpose" in str(node.target)
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    groups = int(argument(node, "groups"))
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
        t.freeze_all(labels, why)
        _unknown(t, node, why)
        return rest
    if groups == 1:
        outputs = t.weight_axis(weight, out_axis)
        _meet(t, labels, inputs, 1, t.weight_axis(weight, in_axis), why)
    else:
        outputs = _grouped(t, node, inputs, weight, groups, transposed, why)
    _share(t, outputs, argument(node, "bias"), 0, why)
    return (*rest, Factor((1,), outputs))


def _grouped(
    t: Tracker, node: fx.Node, inputs: Factor | None, weight: fx.Node, groups: int,
    transposed: bool, why: str,
) -> Array:  # fmt: skip
    """Whole groups go where there are many; else the same places go in every group."""
    shape = t.program.weight(weight).shape
    first = t.weight_axis(weight, 0)
    wide = first.reshape(groups, -1)
    per_group = int(shape[1])
    outputs = t.fresh(groups * per_group, spare=True) if transposed else first
    if inputs is None:
        t.freeze(first, why)
        t.freeze(outputs, why)
        return outputs
    if transposed:
        t.tie(inputs.atoms, first)
    ins = wide if transposed else inputs.atoms.reshape(groups, -1)
    outs = outputs.reshape(groups, -1)
    if groups >= per_group:
        t.tie(ins, ins[:, :1])
        t.tie(outs, outs[:, :1])
        t.tie(ins[:, 0], outs[:, 0])

        def rewrite(keep: Keep) -> None:
            set_argument(node, "groups", int(keep(np.ascontiguousarray(outs[:, 0])).sum()))

        t.rewrites.append(rewrite)
    else:
        t.tie(ins, ins[:1])
        t.tie(outs, outs[:1])
        t.tie(t.weight_axis(weight, 1), (outs if transposed else ins)[0])
    return outputs


@_rule("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm")
def _channel_norm(t: Tracker, node: fx.Node, why: str) -> Result:
    labels = t.commit(t.of(node.args[0]), 1, why)
    for axis in range(2, len(t.shape(node.args[0]))):
        labels = t.fix(labels, axis, why)
    channel = find(labels, 1)
    for one in node.args[1:]:
        _share(t, channel.atoms if channel else None, one, 0, why)
    return labels


@_rule("group_norm")
def _group_norm(t: Tracker, node: fx.Node, why: str) -> Result:
    """Only whole groups may go: the statistics of the others do not change."""
    labels = t.commit(t.of(node.args[0]), 1, why)
    for axis in range(2, len(t.shape(node.args[0]))):
        labels = t.fix(labels, axis, why)
    channel = find(labels, 1)
    for name in ("weight", "bias"):
        _share(t, channel.atoms if channel else None, argument(node, name), 0, why)
    if channel is not None:
        groups = channel.atoms.reshape(int(argument(node, "num_groups")), -1)
        t.tie(groups, groups[:, :1])

        def rewrite(keep: Keep) -> None:
            kept = keep(np.ascontiguousarray(groups[:, 0]))
            set_argument(node, "num_groups", int(kept.sum()))

        t.rewrites.append(rewrite)
    return labels


@_rule("layer_norm", "rms_norm")
def _layer_norm(t: Tracker, node: fx.Node, why: str) -> Result:
    why = f"{why}: its statistics are over this width"
    labels, rank = t.of(node.args[0]), len(t.shape(node.args[0]))
    if t.through_norms and len(argument(node, "normalized_shape")) == 1:
        return norm_over_width(t, node, why)
    for axis in range(rank - len(argument(node, "normalized_shape")), rank):
        labels = t.fix(labels, axis, why)
    for one in node.args[2:]:
        t.freeze_all(t.of(one), why)
    return labels


@_rule("embedding")
def _embedding(t: Tracker, node: fx.Node, why: str) -> Result:
    table, ids = node.args[:2]
    rank = len(t.shape(ids))
    t.freeze_all(t.of(ids), why)
    width = t.take(table, 1, why)
    if isinstance(table, fx.Node) and table.op == "get_attr":
        t.freeze(t.weight_axis(table, 0), f"{why}: every entry of a table can be asked for")
    return () if width is None else (Factor((rank,), width),)


@_rule("matmul", "mm", "bmm", "addmm", "baddbmm")
def _matmul(t: Tracker, node: fx.Node, why: str) -> Result:
    added, (a, b) = None, node.args[:2]
    if "add" in str(node.target):
        added, a, b = node.args[:3]
    left, right = t.shape(a), t.shape(b)
    if len(left) < 2 or len(right) < 2:
        return _unknown(t, node, why)
    rank = max(len(left), len(right))
    first, second = t.first_axes(t.of(a), why), t.first_axes(t.of(b), why)
    if not any(isinstance(one, fx.Node) and one.op == "get_attr" for one in (a, b)):
        # Without a weight to zero instead, losing terms of the sum would be another function.
        first = t.fix(first, len(left) - 1, why)
        second = t.fix(second, len(right) - 2, why)
    inner, other = find(first, len(left) - 1), find(second, len(right) - 2)
    _meet(t, first, inner, len(left) - 1, other.atoms if other else None, why)
    rows, columns = find(first, len(left) - 2), find(second, len(right) - 1)
    batch = [
        (tuple(f for f in labels if max(f.axes) < len(shape) - 2), (*shape[:-2], 1, 1))
        for labels, shape in ((first, left), (second, right))
    ]
    result = list(t.broadcast(batch, rank, why))
    result += [Factor((rank - 2,), rows.atoms)] if rows else []
    result += [Factor((rank - 1,), columns.atoms)] if columns else []
    if added is None:
        return tuple(result)
    shape = t.shape(node)
    return t.broadcast([(tuple(result), shape), (t.of(added), t.shape(added))], rank, why)


@_rule("scaled_dot_product_attention")
def _attention(t: Tracker, node: fx.Node, why: str) -> Result:
    sources = list(node.args[:3])
    rank = len(t.shape(node))
    heads = rank - 3
    if heads < 0:
        return _unknown(t, node, why)
    why = f"{why}: head widths stay"
    grouped = bool(argument(node, "enable_gqa"))
    operands = []
    for at, source in enumerate(sources):
        labels = t.commit(t.of(source), heads, why)
        for axis in (*range(heads), rank - 2, rank - 1):
            labels = t.fix(labels, axis, why)
        shape = t.shape(source)
        factor = find(labels, heads)
        if grouped and at and factor is not None:
            times = int(t.shape(sources[0])[heads]) // len(factor.atoms)
            labels = (Factor((heads,), factor.atoms.repeat(times)),)
            shape = t.shape(sources[0])
        operands.append((labels, (*(1,) * heads, shape[heads], 1, 1)))
    mask = argument(node, "attn_mask")
    if isinstance(mask, fx.Node):
        shape = t.shape(mask)
        labels, own = t.of(mask), len(shape) - 3
        for axis in range(len(shape)):
            labels = labels if axis == own else t.fix(labels, axis, why)
        operands.append((labels, (*(1,) * own, shape[own], 1, 1) if own >= 0 else (1, 1)))
    return t.broadcast(operands, rank, why)


@_rule("_assert_tensor_metadata")
def _asserted(t: Tracker, node: fx.Node, why: str) -> Result:
    if argument(node, "size") is None and argument(node, "stride") is None:
        return ()
    return _unknown(t, node, why)


@_rule(*_SPATIAL)
def _spatial(t: Tracker, node: fx.Node, why: str) -> Result:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    labels, rank = t.of(node.args[0]), len(t.shape(node.args[0]))
    for axis in range(rank - _SPATIAL[name], rank):
        labels = t.fix(labels, axis, why)
    several = isinstance(node.meta.get("val"), list | tuple)
    return [labels] * len(node.meta["val"]) if several else labels


@_rule("pad", "constant_pad_nd")
def _pad(t: Tracker, node: fx.Node, why: str) -> Result:
    labels, rank = t.of(node.args[0]), len(t.shape(node.args[0]))
    widths = list(argument(node, "pad"))
    for pair in range(len(widths) // 2):
        if widths[2 * pair : 2 * pair + 2] != [0, 0]:
            labels = t.fix(labels, rank - 1 - pair, why)
    return labels


@_rule(*_ALONG)
def _along(t: Tracker, node: fx.Node, why: str) -> Result:
    rank = len(t.shape(node.args[0]))
    dims = argument(node, "dims")
    axes = [axis % rank for axis in dims] if dims else [axis_of(node, rank)]
    if dims == []:
        axes = list(range(rank))
    labels = t.of(node.args[0])
    for axis in axes:
        labels = t.fix(labels, axis, why)
    for one in node.all_input_nodes[1:]:
        t.freeze_all(t.of(one), why)
    several = isinstance(node.meta.get("val"), list | tuple)
    return [labels] * len(node.meta["val"]) if several else labels


@_rule(*_REDUCE)
def _reduce(t: Tracker, node: fx.Node, why: str) -> Result:
    if len(node.all_input_nodes) > 1:
        return _unknown(t, node, why)
    if t.through_norms and is_mean_square(node):
        return mean_over_width(t, node, why)
    labels, rank = t.of(node.args[0]), len(t.shape(node.args[0]))
    dims = argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    axes = [axis % rank for axis in dims] if dims else list(range(rank))
    why = f"{why}: it is reduced over this width"
    for axis in axes:
        labels = t.fix(labels, axis, why)
    gone = [] if argument(node, "keepdim") else axes
    result = tuple(
        Factor(tuple(own - sum(g < own for g in gone) for own in factor.axes), factor.atoms)
        for factor in labels
    )
    several = isinstance(node.meta.get("val"), list | tuple)
    return [result] * len(node.meta["val"]) if several else result
