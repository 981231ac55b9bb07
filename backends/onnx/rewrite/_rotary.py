"""Recognizing rotary position embeddings (Su et al. 2021, eq. 34, with the two halves as pairs)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mopt.backends.onnx.rewrite import _match as m


@dataclass(frozen=True)
class Rotation:
    """``x`` (batch, heads, sequence, width), and the factors of each position, broadcast to it."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value


def match_rotation(node: ir.Node) -> Rotation | None:
    """The rotation that ends in this Add: ``x * cos + concat(-right, left) * sin``."""
    for first, second in ((0, 1), (1, 0)):
        plain = m.produced_by(node.inputs[first], "Mul")
        swapped = m.produced_by(node.inputs[second], "Mul")
        if plain is None or swapped is None:
            continue
        for i in (0, 1):
            turned, sin = swapped.inputs[i], swapped.inputs[1 - i]
            x = _rotate_half_input(turned)
            if x is None or sin is None or x not in plain.inputs:
                continue
            cos = plain.inputs[1 - list(plain.inputs).index(x)]
            shape = m.dims(x)
            if cos is not None and shape is not None and len(shape) == 4:
                return Rotation(x, cos, sin)
    return None


def _rotate_half_input(value: ir.Value | None) -> ir.Value | None:
    """x, if ``value`` is ``concat(-x[..., half:], x[..., :half])``."""
    joined = m.produced_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or m.attribute(joined, "axis") not in (-1, 3):
        return None
    negated = m.produced_by(joined.inputs[0], "Neg")
    if negated is None:
        return None
    right, left = _half(negated.inputs[0]), _half(joined.inputs[1])
    if right is None or left is None or right[0] is not left[0]:
        return None
    return right[0] if (left[1], right[1]) == (0, 1) else None


def _half(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(x, 0) for the left and (x, 1) for the right half of x along its last axis."""
    split = m.produced_by(value, "Split")
    if split is not None and m.attribute(split, "axis", 0) in (-1, 3):
        sizes = m.constant(split.inputs[1]) if len(split.inputs) > 1 else None
        equal = len(split.outputs) == 2 and (sizes is None or sizes[0] == sizes[1])
        if equal and split.inputs[0] is not None:
            return split.inputs[0], list(split.outputs).index(value)
    cut = m.produced_by(value, "Slice")
    if cut is None or cut.inputs[0] is None or len(cut.inputs) < 4:
        return None
    start, end, axis = (m.scalar(v) for v in cut.inputs[1:4])
    step = m.scalar(cut.inputs[4]) if len(cut.inputs) > 4 else 1
    shape = m.dims(cut.inputs[0])
    if shape is None or axis not in (-1, len(shape) - 1) or step != 1:
        return None
    width = shape[-1]
    if not isinstance(width, int) or width % 2 or start is None or end is None:
        return None
    if (start, end) == (0, width // 2):
        return cut.inputs[0], 0
    if start == width // 2 and end >= width:
        return cut.inputs[0], 1
    return None


def half_table(table: ir.Value, before: ir.Node) -> ir.Value | None:
    """The first half (sequence, width / 2) of a table whose second half repeats it, if it does.

    The table has shape (sequence, width) or ones in front of that: the same for every row of a
    batch and every head.
    """
    shape = m.dims(table)
    if shape is None or len(shape) < 2 or any(d != 1 for d in shape[:-2]):
        return None
    width = shape[-1]
    if not isinstance(width, int) or width % 2 or not _repeats_half(table):
        return None
    assert isinstance(before.graph, ir.Graph)
    flat = table
    if len(shape) > 2:
        target = m.integers(before.graph, [-1, width])
        flat = m.add_node(before, "Reshape", [table, target], shape=shape[-2:], dtype=table.dtype)
    bounds = [m.integers(before.graph, [v]) for v in (0, width // 2, -1)]
    half = (shape[-2], width // 2)
    return m.add_node(before, "Slice", [flat, *bounds], shape=half, dtype=table.dtype)


_ELEMENTWISE = ("Cos", "Sin", "Cast", "Identity")
_MOVES = ("Unsqueeze", "Squeeze", "Expand", "Reshape", "Slice", "Gather")


def _repeats_half(value: ir.Value | None) -> bool:
    """Whether the last axis holds the same numbers twice, by content or by construction."""
    while value is not None:
        stored = m.constant(value)
        if stored is not None:
            half = stored.shape[-1] // 2
            return bool(np.array_equal(stored[..., :half], stored[..., half:]))
        node = value.producer()
        if node is None or node.domain:
            return False
        if node.op_type == "Concat":
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        if node.op_type == "Mul":
            value = next((a for a, b in (node.inputs, node.inputs[::-1])
                          if m.scalar(b) is not None), None)  # fmt: skip
        elif node.op_type in _ELEMENTWISE or _keeps_last_axis(node):
            value = node.inputs[0]
        else:
            return False
    return False


def _keeps_last_axis(node: ir.Node) -> bool:
    """Whether a node that moves data leaves the last axis whole and last."""
    before, after = m.dims(node.inputs[0]), m.dims(node.outputs[0])
    if before is None or after is None or not before or not after:
        return False
    return node.op_type in _MOVES and isinstance(before[-1], int) and before[-1] == after[-1]
