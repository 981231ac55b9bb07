"""Recognizing masks that hide every later token."""

from __future__ import annotations

import onnx_ir as ir

from mopt.backends.onnx.rewrite import _match as m

# An added number below this hides a token: softmax gives it a weight that float32 rounds away.
HIDING = -1e30


def hides_future(mask: ir.Value | None) -> tuple[bool, bool]:
    """(whether ``mask`` hides every later token, whether it hides nothing else).

    ``mask`` is what Attention adds or a boolean, its last two axes queries and keys, counted from
    the same first token.
    """
    where = m.produced_by(mask, "Where")
    if where is not None:
        hidden = m.scalar(where.inputs[2])
        if m.scalar(where.inputs[1]) != 0 or hidden is None or hidden > HIDING:
            return False, False
        mask = where.inputs[0]
    both = m.produced_by(mask, "And")
    if both is not None:
        parts = [hides_future(value) for value in both.inputs]
        nothing_else = all(
            exact or _always_true(value)
            for (_, exact), value in zip(parts, both.inputs, strict=True)
        )
        causal = any(causal for causal, _ in parts)
        return causal, causal and nothing_else
    for op_type in ("Expand", "Unsqueeze"):
        moved = m.produced_by(mask, op_type)
        if moved is not None:
            return hides_future(moved.inputs[0]) if _keeps_last_axes(moved) else (False, False)
    causal = _compares_positions(mask)
    return causal, causal


def _keeps_last_axes(node: ir.Node) -> bool:
    """Whether Expand or Unsqueeze adds only axes or extent in front of the last two axes."""
    before, after = m.dims(node.inputs[0]), m.dims(node.outputs[0])
    if before is None or after is None or len(before) < 2:
        return False
    if node.op_type == "Expand":
        return m.same_sizes(before[-2:], after[-2:])
    axes = m.constant(node.inputs[1])
    return axes is not None and all(0 <= axis < len(after) - 2 for axis in axes.reshape(-1))


def _always_true(value: ir.Value | None) -> bool:
    array = m.constant(value)
    return array is not None and array.dtype == bool and bool(array.all())


def _compares_positions(value: ir.Value | None) -> bool:
    """Whether ``value`` is ``key position <= query position``."""
    for op_type, key, query in (("LessOrEqual", 0, 1), ("GreaterOrEqual", 1, 0)):
        node = m.produced_by(value, op_type)
        if node is None:
            continue
        keys, queries = _positions(node.inputs[key], -1), _positions(node.inputs[query], -2)
        return keys is not None and m.same_sizes([keys], [queries])
    return False


def _positions(value: ir.Value | None, axis: int) -> int | str | None:
    """n, if ``value`` counts 0 .. n - 1 along ``axis`` and has no other extent."""
    shape = m.dims(value)
    if shape is None or (axis == -2 and len(shape) < 2):
        return None
    if any(d != 1 for i, d in enumerate(shape) if i != len(shape) + axis):
        return None
    while m.produced_by(value, "Unsqueeze") is not None:
        value = m.produced_by(value, "Unsqueeze").inputs[0]  # type: ignore[union-attr]
    counted = m.produced_by(value, "Range")
    if counted is None or m.scalar(counted.inputs[0]) != 0 or m.scalar(counted.inputs[2]) != 1:
        return None
    return shape[axis]
