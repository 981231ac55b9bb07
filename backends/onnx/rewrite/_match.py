"""What rewrites share: reading a graph, and putting new nodes into it.

Matching goes from a node upwards. ``produced_by`` looks at one step, ``constant`` reads a stored
value; both give None when the graph is different, so a match is a chain of plain ifs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"


def nodes_of(model: ir.Model, op_type: str, domain: str = "") -> Iterator[ir.Node]:
    """The nodes of one operator in the main graph, in order, safe to edit under."""
    for node in list(model.graph):
        if node.op_type == op_type and node.domain == domain and node.graph is model.graph:
            yield node


def produced_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that computes ``value`` if it is of this operator."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == op_type and node.domain == domain:
        return node
    return None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value`` once; None if there are more or it is a graph output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node


def read_only_by(value: ir.Value, node: ir.Node) -> bool:
    """Whether ``node`` reads ``value`` once and nothing else reads it."""
    return only_user(value) is node


def is_stored(value: ir.Value | None) -> bool:
    """Whether the file holds the content of ``value``."""
    return value is not None and value.is_initializer() and value.const_value is not None


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The content of a stored value."""
    if value is None or not is_stored(value):
        return None
    assert value.const_value is not None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The content of a stored value of one element."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's plain value."""
    found = node.attributes.get(name)
    return default if found is None or found.value is None else found.value


def dims(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """The shape: known sizes as int, dynamic ones by name or expression, None if unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def same_sizes(
    first: Sequence[int | str | None] | None, second: Sequence[int | str | None] | None
) -> bool:
    """Whether two shapes, or parts of shapes, are known to be equal."""
    if first is None or second is None or len(first) != len(second):
        return False
    return all(a is not None and a == b for a, b in zip(first, second, strict=True))


def add_node(
    like: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any] | None = None,
    *,
    domain: str = "",
    shape: Sequence[int | str | None] | None = None,
    dtype: ir.DataType | None = None,
    name: str | None = None,
) -> ir.Value:
    """A new node of one result right before ``like``, which gives the result its dtype.

    ``name`` names the result.
    """
    wanted = list(inputs)
    while wanted and wanted[-1] is None:
        wanted.pop()
    output = ir.Value(
        name=name,
        shape=None if shape is None else ir.Shape(shape),
        type=ir.TensorType(dtype if dtype is not None else like.outputs[0].dtype),
    )
    node = ir.Node(
        domain,
        op_type,
        wanted,
        attributes=ir.convenience.convert_attributes(attributes or {}),
        outputs=[output],
        version=1 if domain == MICROSOFT else None,
    )
    assert like.graph is not None
    like.graph.insert_before(like, node)
    return output


def store(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """A new initializer called ``name``, or ``name_2`` and so on if that is taken."""
    unique, count = name, 1
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    array = np.ascontiguousarray(array).reshape(array.shape)
    tensor = ir.Tensor(array, name=unique)
    value = ir.Value(
        name=unique,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def store_shared(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """The initializer called ``name``, which always has this content; made when first asked for."""
    known = graph.initializers.get(name)
    return known if known is not None else store(graph, name, array)


def integers(graph: ir.Graph, values: Sequence[int]) -> ir.Value:
    """An int64 initializer of one axis, shared by everyone who asks for the same numbers."""
    name = "ints_" + "_".join(str(v).replace("-", "m") for v in values)
    return store_shared(graph, name, np.array(values, dtype=np.int64))


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old``, the graph's outputs included, read ``new``."""
    if old.is_graph_output() or new.name is None:
        new.name, old.name = old.name, None
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
