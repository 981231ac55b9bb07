"""Attention heads: from (batch, heads, sequence, width) to (batch, sequence, heads * width)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mopt.backends.onnx.rewrite import _match as m


@dataclass(frozen=True)
class Heads:
    """A rank-4 value (batch, heads, sequence, width) and where its content lies flat.

    ``source`` has shape (batch, sequence, n * heads * width), or (batch, sequence, heads, width)
    where that is how the model computes it; the heads are its ``part``-th slice
    of ``parts`` equal ones along the last axis, rotated by ``rotary`` if that is given.
    """

    source: ir.Value
    count: int
    width: int
    parts: int = 1
    part: int = 0
    rotary: ir.Node | None = None


def flat_heads(value: ir.Value | None) -> Heads | None:
    """Where the heads of a rank-4 attention input lie side by side, if they do somewhere."""
    rotary = m.produced_by(value, "RotaryEmbedding", m.MICROSOFT)
    if rotary is not None:
        plain = _transposed(rotary.inputs[0]) or _one_of_stacked(rotary.inputs[0])
        return None if plain is None else replace(plain, rotary=rotary)
    return _transposed(value) or _one_of_stacked(value)


def _transposed(value: ir.Value | None) -> Heads | None:
    """Transpose(0, 2, 1, 3) of (batch, sequence, heads, width), as a rule made by a reshape."""
    transpose = m.produced_by(value, "Transpose")
    if transpose is None or list(m.attribute(transpose, "perm")) != [0, 2, 1, 3]:
        return None
    source, split = transpose.inputs[0], m.dims(transpose.inputs[0])
    if source is None or split is None or len(split) != 4:
        return None
    heads, width = split[2:]
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    reshape = m.produced_by(source, "Reshape")
    flat = m.dims(reshape.inputs[0]) if reshape is not None else None
    if reshape is not None and m.same_sizes(flat, [*split[:2], heads * width]):
        source = reshape.inputs[0]
        assert source is not None
    return Heads(source, heads, width)


def _one_of_stacked(value: ir.Value | None) -> Heads | None:
    """One of n along the first axis of Transpose(2, 0, 3, 1, 4) of a reshape that splits the last.

    The reshape gives (batch, sequence, n, heads, width). That is how a model with a single layer
    for queries, keys and values separates them.
    """
    found = _picked(value)
    if found is None:
        return None
    stacked, part = found
    transpose = m.produced_by(stacked, "Transpose")
    if transpose is None or list(m.attribute(transpose, "perm")) != [2, 0, 3, 1, 4]:
        return None
    reshape = m.produced_by(transpose.inputs[0], "Reshape")
    if reshape is None:
        return None
    flat, split = m.dims(reshape.inputs[0]), m.dims(reshape.outputs[0])
    if flat is None or split is None or len(flat) != 3 or len(split) != 5:
        return None
    parts, heads, width = split[2:]
    if not (isinstance(parts, int) and isinstance(heads, int) and isinstance(width, int)):
        return None
    if flat[2] != parts * heads * width or not m.same_sizes(flat[:2], split[:2]):
        return None
    source = reshape.inputs[0]
    assert source is not None
    return Heads(source, heads, width, parts, part % parts)


def _picked(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(x, i) if ``value`` is x[i]: a Gather of one index, or a Slice of length one, squeezed."""
    gather = m.produced_by(value, "Gather")
    if gather is not None and m.attribute(gather, "axis", 0) == 0:
        index = m.constant(gather.inputs[1])
        if index is not None and index.shape == () and gather.inputs[0] is not None:
            return gather.inputs[0], int(index)
    squeeze = m.produced_by(value, "Squeeze")
    if squeeze is None or not _is_ints(squeeze.inputs[1] if len(squeeze.inputs) > 1 else None, [0]):
        return None
    cut = m.produced_by(squeeze.inputs[0], "Slice")
    if cut is not None and cut.inputs[0] is not None:
        start, end = m.scalar(cut.inputs[1]), m.scalar(cut.inputs[2])
        axis = cut.inputs[3] if len(cut.inputs) > 3 else None
        step = cut.inputs[4] if len(cut.inputs) > 4 else None
        if start is None or end != start + 1 or not _is_ints(axis, [0]):
            return None
        if step is not None and m.scalar(step) != 1:
            return None
        return cut.inputs[0], int(start)
    split = m.produced_by(squeeze.inputs[0], "Split")
    if split is not None and m.attribute(split, "axis", 0) == 0 and split.inputs[0] is not None:
        sizes = m.constant(split.inputs[1]) if len(split.inputs) > 1 else None
        if sizes is None or bool(np.all(sizes == 1)):
            return split.inputs[0], list(split.outputs).index(squeeze.inputs[0])
    return None


def _is_ints(value: ir.Value | None, wanted: list[int]) -> bool:
    array = m.constant(value)
    return array is not None and array.reshape(-1).tolist() == wanted


class FlatParts:
    """Gives the flat value of heads; those that share a source come from one Split."""

    def __init__(self) -> None:
        self._splits: dict[ir.Value, list[ir.Value]] = {}

    def value(self, heads: Heads, before: ir.Node) -> ir.Value:
        """A value (batch, sequence, heads * width), computed before ``before`` if need be."""
        flat = heads.source
        shape = m.dims(flat)
        assert shape is not None and isinstance(before.graph, ir.Graph)
        if len(shape) == 4:
            whole = heads.count * heads.width
            target = m.integers(before.graph, [0, 0, whole])
            flat = m.add_node(before, "Reshape", [flat, target], shape=[*shape[:2], whole])
        if heads.parts > 1:
            if heads.source not in self._splits:
                self._splits[heads.source] = _split(heads, before)
            flat = self._splits[heads.source][heads.part]
        if heads.rotary is not None:
            inputs = [flat, *heads.rotary.inputs[1:]]
            attributes = {"num_heads": heads.count}
            shape = m.dims(flat)
            flat = m.add_node(
                before, "RotaryEmbedding", inputs, attributes, domain=m.MICROSOFT, shape=shape
            )
        return flat


def _split(heads: Heads, before: ir.Node) -> list[ir.Value]:
    shape = m.dims(heads.source)
    assert shape is not None and before.graph is not None
    outputs = [
        ir.Value(
            name=f"{heads.source.name}_{i}",
            shape=ir.Shape([*shape[:2], heads.count * heads.width]),
            type=heads.source.type,
        )
        for i in range(heads.parts)
    ]
    node = ir.Node(
        "",
        "Split",
        [heads.source],
        attributes=ir.convenience.convert_attributes({"axis": -1, "num_outputs": heads.parts}),
        outputs=outputs,
    )
    producer = heads.source.producer()
    assert producer is not None
    before.graph.insert_after(producer, node)
    return outputs


def put_flat_result(old: ir.Value, flat: ir.Value, heads: int, width: int) -> None:
    """Let the readers of ``old`` (batch, heads, sequence, width) read it from ``flat``.

    Where the model transposes and reshapes to (batch, sequence, heads * width), both disappear.
    """
    for use in list(old.uses()):
        transpose = use.node
        if _is_heads_transpose(transpose):
            for inner in list(transpose.outputs[0].uses()):
                if _merges_heads(inner.node, heads * width):
                    m.replace(inner.node.outputs[0], flat)
    if not old.uses() and not old.is_graph_output():
        return
    users = [use.node for use in old.uses()]
    if all(_is_heads_transpose(n) and not n.outputs[0].uses() for n in users):
        return
    shape = m.dims(flat)
    producer = flat.producer()
    assert shape is not None and producer is not None and isinstance(producer.graph, ir.Graph)
    anchor = old.producer()
    assert anchor is not None
    target = m.integers(producer.graph, [0, 0, heads, width])
    split = m.add_node(anchor, "Reshape", [flat, target], shape=[*shape[:2], heads, width])
    m.replace(old, m.add_node(anchor, "Transpose", [split], {"perm": [0, 2, 1, 3]}))


def _is_heads_transpose(node: ir.Node) -> bool:
    return (
        node.op_type == "Transpose"
        and list(m.attribute(node, "perm")) == [0, 2, 1, 3]
        and not node.outputs[0].is_graph_output()
    )


def _merges_heads(node: ir.Node, whole: int) -> bool:
    split, flat = m.dims(node.inputs[0]), m.dims(node.outputs[0])
    if node.op_type != "Reshape" or split is None or flat is None:
        return False
    return m.same_sizes(flat, [*split[:2], whole])
