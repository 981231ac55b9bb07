"""Masks of Attention in the form ONNX Runtime's kernel accepts and runs fastest.

The kernel insists on a mask whose query axis has its full length, while PyTorch broadcasts it, and
it turns a mask of booleans into numbers in every layer. Here that happens once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mopt.backends.onnx.rewrite import _match as m

ORDER = 55


def rewrite(model: ir.Model) -> int:
    """Make masks additive, and as long as the queries; layers with one mask share the result."""
    done: dict[tuple[ir.Value, int | str | None], ir.Value] = {}
    changed = 0
    for node in m.nodes_of(model, "Attention"):
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        query = m.dims(node.inputs[0])
        if mask is None or query is None:
            continue
        axis = 1 if "q_num_heads" in node.attributes else 2
        key = (mask, query[axis])
        if key not in done:
            done[key] = _additive(_full_length(mask, node, axis), node)
        if done[key] is not mask:
            node.replace_input_with(3, done[key])
            changed += 1
    return changed


def _full_length(mask: ir.Value, node: ir.Node, axis: int) -> ir.Value:
    """The mask with its second axis from the end as long as the queries."""
    shape, query = m.dims(mask), m.dims(node.inputs[0])
    assert query is not None and isinstance(node.graph, ir.Graph)
    if shape is None or len(shape) < 2 or m.same_sizes(shape[-2:-1], query[axis : axis + 1]):
        return mask
    if shape[-2] != 1:
        return mask
    ones = m.integers(node.graph, [1])
    length = m.add_node(
        node,
        "Shape",
        [node.inputs[0]],
        {"start": axis, "end": axis + 1},
        shape=[1],
        dtype=ir.DataType.INT64,
    )
    target = m.add_node(node, "Concat", [length, ones], {"axis": 0}, shape=[2], dtype=length.dtype)
    return m.add_node(
        node,
        "Expand",
        [mask, target],
        shape=[*shape[:-2], query[axis], shape[-1]],
        dtype=mask.dtype,
    )


def _additive(mask: ir.Value, node: ir.Node) -> ir.Value:
    if mask.dtype != ir.DataType.BOOL:
        return mask
    assert isinstance(node.graph, ir.Graph)
    number = node.outputs[0].dtype
    assert number is not None
    kept = m.store_shared(node.graph, "mask_kept", np.zeros((), dtype=number.numpy()))
    # The lowest number, not minus infinity: a row that may look at nothing must not become NaN and
    # spread through the next layer. Such a row gives the mean of the values; PyTorch gives 0.
    lowest = np.finfo(number.numpy()).min
    hidden = m.store_shared(node.graph, "mask_hidden", np.full((), lowest, dtype=number.numpy()))
    return m.add_node(node, "Where", [mask, kept, hidden], shape=m.dims(mask), dtype=number)
