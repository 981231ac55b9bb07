"""Attention written out as two products and a softmax becomes one operator."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.rewrite import _match as m
from mopt.backends.onnx.rewrite._causal_mask import HIDING

ORDER = 30


def rewrite(model: ir.Model) -> int:
    """Replace ``softmax(q @ k^T * scale + mask) @ v`` over four axes, the mask being added last."""
    changed = 0
    for node in m.nodes_of(model, "MatMul"):
        softmax = m.produced_by(node.inputs[0], "Softmax")
        if softmax is None or not m.read_only_by(softmax.outputs[0], node):
            continue
        shape = m.dims(softmax.outputs[0])
        if shape is None or len(shape) != 4 or m.attribute(softmax, "axis", -1) not in (-1, 3):
            continue
        found = _scores(softmax.inputs[0])
        value = node.inputs[1]
        if found is None or value is None:
            continue
        query, key, scale, mask = found
        if not _fit(query, key, value) or query.dtype != ir.DataType.FLOAT:
            continue
        result = m.add_node(node, "Attention", [query, key, value, mask], {"scale": scale})
        m.replace(node.outputs[0], result)
        changed += 1
    return changed


def _fit(query: ir.Value, key: ir.Value, value: ir.Value) -> bool:
    q, k, v = m.dims(query), m.dims(key), m.dims(value)
    if q is None or k is None or v is None or len(q) != 4 or len(k) != 4 or len(v) != 4:
        return False
    return m.same_sizes(q[:2], k[:2]) and m.same_sizes(k[:3], v[:3]) and m.same_sizes(q[3:], k[3:])


def _scores(
    value: ir.Value | None,
) -> tuple[ir.Value, ir.Value, float, ir.Value | None] | None:
    """(query, key, scale, mask) if ``value`` is ``query @ key^T * scale + mask``."""
    filled = m.produced_by(value, "Where")
    if filled is not None:
        return _filled(filled)
    added = m.produced_by(value, "Add")
    if added is None:
        plain = _scaled(value)
        return None if plain is None else (*plain, None)
    for scores, mask in (tuple(added.inputs), tuple(added.inputs[::-1])):
        plain = _scaled(scores)
        if plain is not None and mask is not None and _is_mask(mask, scores):
            return (*plain, mask)
    return None


def _filled(where: ir.Node) -> tuple[ir.Value, ir.Value, float, ir.Value | None] | None:
    """The same for ``scores.masked_fill(hidden, lowest)``."""
    hidden, lowest, scores = where.inputs
    plain, number = _scaled(scores), m.scalar(lowest)
    if plain is None or hidden is None or number is None or number > HIDING:
        return None
    if not _is_mask(hidden, scores):
        return None
    kept = m.add_node(where, "Not", [hidden], shape=m.dims(hidden), dtype=ir.DataType.BOOL)
    return (*plain, kept)


def _is_mask(mask: ir.Value, scores: ir.Value | None) -> bool:
    """Whether the operator can broadcast ``mask``: its last axis is the keys', of full length."""
    shape, full = m.dims(mask), m.dims(scores)
    if shape is None or full is None or not 2 <= len(shape) <= 4:
        return False
    return m.same_sizes(shape[-1:], full[-1:]) and (
        shape[-2] == 1 or m.same_sizes(shape[-2:-1], full[-2:-1])
    )


def _scaled(value: ir.Value | None) -> tuple[ir.Value, ir.Value, float] | None:
    """(query, key, scale) of a product, scaled after it or not at all."""
    scale: Any = 1.0
    multiplied, divided = m.produced_by(value, "Mul"), m.produced_by(value, "Div")
    if multiplied is not None:
        first, second = multiplied.inputs
        scale = m.scalar(second) if m.scalar(second) is not None else m.scalar(first)
        value = first if m.scalar(second) is not None else second
    elif divided is not None:
        divisor = m.scalar(divided.inputs[1])
        scale = 1 / divisor if divisor else None
        value = divided.inputs[0]
    product = m.produced_by(value, "MatMul")
    if scale is None or product is None or value is None or len(value.uses()) != 1:
        return None
    query, key = product.inputs[0], _untransposed(product.inputs[1])
    return None if query is None or key is None else (query, key, scale)


def _untransposed(value: ir.Value | None) -> ir.Value | None:
    """(batch, heads, sequence, width) keys from (batch, heads, width, sequence)."""
    transpose = m.produced_by(value, "Transpose")
    if transpose is None:
        return None
    order, source = list(m.attribute(transpose, "perm")), transpose.inputs[0]
    shape = m.dims(source)
    if order == [0, 1, 3, 2]:
        return source
    if order != [0, 2, 3, 1] or shape is None:
        return None
    moved = [shape[0], shape[2], shape[1], shape[3]]
    return m.add_node(transpose, "Transpose", [source], {"perm": [0, 2, 1, 3]}, shape=moved)
