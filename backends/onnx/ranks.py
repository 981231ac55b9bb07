"""A bound on the number of dimensions of every value of an ONNX graph.

Shape inference runs in every runtime that loads a model, and it writes down all dimensions of all
values. ``Gather(x, x)`` nearly doubles them: a chain of 20 is 522 bytes of file and takes ONNX
Runtime 481 MB to load with every optimization off, 26 would take 30 GB. So do chains of ``Concat``
below a ``Shape``, ``Unsqueeze`` with many axes, and an ``Expand`` to a shape of a million sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

MOST_DIMENSIONS = 64
# Taken where nothing is known: images have 4, volumes 5, attention heads at most 5.
_UNKNOWN = 5
_SAME = frozenset({"Cast", "CastLike", "Identity", "Neg", "Abs", "Not", "Squeeze", "Flatten"})
_BROADCAST = frozenset(
    {"Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Equal", "Less", "Greater", "Where", "And"}
)


@dataclass(frozen=True)
class _Value:
    """At most so many dimensions; at most so many elements, None where not known; the first
    element if it is a constant."""

    rank: int
    size: int | None = None
    first: int | None = None


def first_deep_value(graph: onnx.GraphProto, tick: Callable[[], None]) -> str | None:
    """The name of a value that may have more than 64 dimensions, or None.

    Chains that make ranks grow are followed; where the length of a shape is not known from the
    graph, five is assumed. ``tick`` is called for every node.
    """
    return _walk(graph, {}, tick)


def _walk(
    graph: onnx.GraphProto, outer: Mapping[str, _Value], tick: Callable[[], None]
) -> str | None:
    known = dict(outer)
    for value in graph.input:
        known[value.name] = _declared(value)
    for tensor in graph.initializer:
        known[tensor.name] = _of_tensor(tensor)
    for node in graph.node:
        tick()
        inputs = [known.get(name, _Value(_UNKNOWN)) if name else None for name in node.input]
        result = _result(node, inputs)
        for name in node.output:
            known[name] = result
        if result.rank > MOST_DIMENSIONS:
            return str(node.output[0]) if node.output else str(node.op_type)
        for attribute in node.attribute:
            if attribute.HasField("g") and (found := _walk(attribute.g, known, tick)):
                return found
    return None


def _declared(value: onnx.ValueInfoProto) -> _Value:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return _Value(_UNKNOWN)
    return _of_sizes([d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim])


def _of_sizes(sizes: object) -> _Value:
    size: int | None = 1
    dims = list(sizes)  # type: ignore[call-overload]
    for n in dims:
        size = None if size is None or n < 0 else size * n
    return _Value(len(dims), size)


def _result(node: onnx.NodeProto, inputs: list[_Value | None]) -> _Value:
    given = [value for value in inputs if value is not None]
    op, rank = node.op_type, max((value.rank for value in given), default=0)
    if node.domain:
        return _Value(max(rank, _UNKNOWN))
    if op == "Constant":
        return _constant(node)
    if not given:
        return _Value(_UNKNOWN)
    first = given[0]
    second = given[1] if len(given) > 1 else None
    if op == "Shape":
        ends = {a.name: int(a.i) for a in node.attribute}
        return _Value(1, len(range(first.rank)[ends.get("start") : ends.get("end")]))
    if op == "Slice":
        return _Value(first.rank, _sliced_size(first, inputs))
    if op == "Size":
        return _Value(0, 1)
    if op == "Gather" and second is not None:
        is_vector = first.rank <= 1
        return _Value(max(first.rank - 1, 0) + second.rank, second.size if is_vector else None)
    if op == "Unsqueeze":
        added = _axes(node) if second is None else _length(second)
        return _Value(first.rank + added, first.size)
    if op == "Concat":
        sizes = [value.size for value in given]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        return _Value(rank, total)
    if op == "Reshape" and second is not None:
        return _Value(_length(second), first.size)
    if op == "Expand" and second is not None:
        return _Value(max(first.rank, _length(second)))
    if op == "ConstantOfShape":
        return _Value(_length(first))
    if op == "OneHot":
        return _Value(first.rank + 1)
    if op in _SAME:
        return _Value(max(first.rank, 2 if op == "Flatten" else 0), first.size)
    if op in _BROADCAST:
        sizes = [value.size for value in given]
        is_vector = rank <= 1 and None not in sizes
        return _Value(rank, max(size or 0 for size in sizes) if is_vector else None)
    return _Value(max(rank, _UNKNOWN))


def _of_tensor(tensor: onnx.TensorProto) -> _Value:
    found = _of_sizes(tensor.dims)
    is_integer = tensor.data_type in (6, 7) and not tensor.data_location
    if not is_integer or found.size != 1:
        return found
    width = 4 if tensor.data_type == 6 else 8
    if len(tensor.raw_data) == width:
        return _Value(found.rank, 1, int.from_bytes(tensor.raw_data, "little", signed=True))
    typed = tensor.int32_data or tensor.int64_data
    return _Value(found.rank, 1, typed[0] if typed else None)


def _sliced_size(data: _Value, inputs: list[_Value | None]) -> int | None:
    """The length of a slice of a vector; that of the vector where the bounds are not constants."""
    bounds = [value.first if value is not None else None for value in inputs[1:3]]
    has_step = len(inputs) > 4
    if data.size is None or data.rank > 1 or has_step or len(bounds) < 2 or None in bounds:
        return data.size
    return len(range(data.size)[bounds[0] : bounds[1]])


def _length(shape: _Value) -> int:
    """How many sizes a shape has, which is the rank of what it describes."""
    return _UNKNOWN if shape.size is None else shape.size


def _axes(node: onnx.NodeProto) -> int:
    return next((len(a.ints) for a in node.attribute if a.name == "axes"), _UNKNOWN)


def _constant(node: onnx.NodeProto) -> _Value:
    for attribute in node.attribute:
        if attribute.name == "value":
            return _of_tensor(attribute.t)
        if attribute.name in ("value_ints", "value_floats"):
            return _Value(1, len(attribute.ints) + len(attribute.floats))
    return _Value(0, 1)
