"""Keys and values repeated for grouped queries are not repeated: the kernel groups by itself."""

from __future__ import annotations

import onnx_ir as ir

from mopt.backends.onnx.rewrite import _match as m

ORDER = 45


def rewrite(model: ir.Model) -> int:
    """Let Attention read keys and values from before each head was repeated a number of times."""
    changed = 0
    for node in m.nodes_of(model, "Attention"):
        if "q_num_heads" in node.attributes:
            continue
        key, value = _before_repeat(node.inputs[1]), _before_repeat(node.inputs[2])
        if key is None or value is None:
            continue
        k, v = m.dims(key), m.dims(value)
        if k is None or v is None or k[1] != v[1]:
            continue
        node.replace_input_with(1, key)
        node.replace_input_with(2, value)
        changed += 1
    return changed


def _before_repeat(value: ir.Value | None) -> ir.Value | None:
    """x (batch, heads, s, w) if ``value`` is x with each head repeated, as repeat_interleave does.

    That is Unsqueeze to (batch, heads, 1, s, w), Expand to (batch, heads, n, s, w), Reshape.
    """
    reshape = m.produced_by(value, "Reshape")
    expand = m.produced_by(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = m.produced_by(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if expand is None or unsqueeze is None:
        return None
    wide, result, source = m.dims(expand.outputs[0]), m.dims(value), m.dims(unsqueeze.inputs[0])
    single = m.dims(unsqueeze.outputs[0])
    if wide is None or result is None or source is None or single is None:
        return None
    if len(wide) != 5 or len(result) != 4 or len(source) != 4 or single[2] != 1:
        return None
    heads, times = wide[1:3]
    if not isinstance(heads, int) or not isinstance(times, int):
        return None
    if result[1] != heads * times or source[1] != heads:
        return None
    return unsqueeze.inputs[0] if m.same_sizes(source[2:], wide[3:]) else None
