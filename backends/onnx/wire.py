"""The outline of an ONNX file, read without a protobuf library and without touching weights.

The weights of a model are most of its bytes. ``scan_model`` walks the wire format of a mapped
file, notes each initializer (name, type, shape, where its bytes are) and gives the rest as a small
model of its own, the skeleton. So a gigabyte can be checked in milliseconds, and a hostile file is
bounded before any library parses it. Field numbers are those of ``onnx.proto``.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field

from mopt.errors import LimitError, MoptError, quote
from mopt.limits import DEFAULT_LIMITS, Limits
from mopt.safe_read import OpenFile

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# ModelProto
_MODEL_FIELDS = {
    1: VARINT, 2: BYTES, 3: BYTES, 4: BYTES, 5: VARINT, 6: BYTES, 7: BYTES, 8: BYTES, 14: BYTES,
    20: BYTES, 25: BYTES,
}  # fmt: skip
_GRAPH, _TRAINING, _FUNCTIONS = 7, 20, 25
# GraphProto
_NODE, _INITIALIZER, _SPARSE_INITIALIZER = 1, 5, 15
_GRAPH_FIELDS = frozenset({1, 2, 5, 10, 11, 12, 13, 14, 15, 16})
# TensorProto
_DIMS, _DATA_TYPE, _SEGMENT, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 3, 8, 9, 13, 14
_TYPED_DATA = frozenset({4, 5, 7, 10, 11})
_TENSOR_FIELDS = frozenset({1, 2, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 16})
_ONCE = frozenset({_DATA_TYPE, _NAME, _RAW, _LOCATION})
_IS_EXTERNAL = bytes([_LOCATION << 3, 1])

# Bits of one element, by TensorProto.DataType; strings and complex numbers are not read.
ELEMENT_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip

# Values this small stay in the skeleton: they are the shapes and axes that decide other shapes.
_KEPT_BYTES = 4096


@dataclass(frozen=True)
class Initializer:
    """One initializer of the main graph. ``external`` holds the raw key and value texts."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    nbytes: int
    external: tuple[tuple[str, str], ...] | None


@dataclass(frozen=True)
class Outline:
    """What ``scan_model`` found; ``skeleton`` is the model without the bytes of large weights."""

    initializers: tuple[Initializer, ...]
    nodes: int
    skeleton: bytes = field(repr=False)


class _Reader:
    """Walks one buffer; every refusal names the file."""

    def __init__(self, buffer: mmap.mmap | bytes, file: OpenFile, limits: Limits) -> None:
        self.buffer = buffer
        self.file = file
        self.fields_left = 4 * limits.onnx_nodes
        self.limits = limits

    def refuse(self, what: str) -> MoptError:
        return self.file.error(f"{self.file.name} {what}", code="onnx-format")

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self.buffer[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at
            shift += 7
        raise self.refuse(f"holds a broken number at byte {at}")

    def fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(number, wire type, begin of the field, begin and end of its content).

        For a varint the content's begin is its value.
        """
        while at < end:
            self.fields_left -= 1
            if self.fields_left < 0:
                raise LimitError(
                    f"{self.file.name} has more parts than {self.limits.onnx_nodes} nodes need",
                    code="onnx-too-large",
                )
            begin = at
            tag, at = self.varint(at, end)
            number, kind = tag >> 3, tag & 7
            if not 1 <= number <= 1 << 20:
                raise self.refuse(f"holds the field number {number}")
            if kind == VARINT:
                value, at = self.varint(at, end)
                yield number, kind, begin, value, at
                continue
            if kind == BYTES:
                length, at = self.varint(at, end)
            elif kind in (FIXED32, FIXED64):
                length = 4 if kind == FIXED32 else 8
            else:
                raise self.refuse(f"holds the wire type {kind}")
            if length > end - at:
                raise self.refuse(f"ends within a field of {length} bytes")
            yield number, kind, begin, at, at + length
            at += length

    def text(self, begin: int, end: int) -> str:
        if end - begin > 4096:
            raise self.refuse(f"holds a name of {end - begin} bytes")
        try:
            return self.buffer[begin:end].decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.refuse("holds a name that is not UTF-8") from e


def scan_model(file: OpenFile, *, limits: Limits = DEFAULT_LIMITS) -> Outline:
    """The outline of an opened ONNX file, within the ``onnx_*`` limits.

    Raises the file's error class (``onnx-format``, ``onnx-forbidden``) or LimitError
    (``onnx-too-large``).
    """
    if file.size > limits.onnx_bytes:
        raise _too_large(file, f"has {file.size} bytes, at most {limits.onnx_bytes} are read")
    if not file.size:
        raise file.error(f"{file.name} is empty", code="onnx-format")
    with file.map() as buffer:
        reader = _Reader(buffer, file, limits)
        graph: tuple[int, int] | None = None
        around: list[bytes] = []
        around_bytes = 0
        for number, kind, begin, start, end in reader.fields(0, file.size):
            if _MODEL_FIELDS.get(number) != kind:
                raise reader.refuse(f"holds the unknown model field {number}")
            if number in (_TRAINING, _FUNCTIONS):
                what = "training graphs" if number == _TRAINING else "functions of its own"
                raise file.error(
                    f"{file.name} holds {what}, expected one plain graph", code="onnx-forbidden"
                )
            if number == _GRAPH:
                if graph is not None:
                    raise reader.refuse("holds two graphs")
                graph = (start, end)
                continue
            around_bytes += end - begin
            if around_bytes > limits.onnx_graph_bytes:
                raise _too_large(file, "is too large besides its graph")
            around.append(buffer[begin:end])
        if graph is None:
            raise reader.refuse("holds no graph")
        return _scan_graph(reader, *graph, around)


def _scan_graph(reader: _Reader, at: int, end: int, around: list[bytes]) -> Outline:
    file, limits, buffer = reader.file, reader.limits, reader.buffer
    found: list[Initializer] = []
    parts: list[bytes] = []
    kept = nodes = 0
    run = at
    for number, kind, begin, start, stop in reader.fields(at, end):
        if number not in _GRAPH_FIELDS or kind != BYTES:
            raise reader.refuse(f"holds the unknown graph field {number}")
        if number == _SPARSE_INITIALIZER:
            raise file.error(f"{file.name} holds sparse initializers", code="onnx-forbidden")
        if number == _NODE:
            nodes += 1
            if nodes > limits.onnx_nodes:
                raise _too_large(file, f"has more than {limits.onnx_nodes} nodes")
        if number == _INITIALIZER:
            initializer, cut = _scan_tensor(reader, start, stop)
            found.append(initializer)
            if cut is not None:
                parts.append(buffer[run:begin])
                kept += begin - run
                small = buffer[start : cut[0]] + buffer[cut[1] : stop] + _IS_EXTERNAL
                parts.append(_field(_INITIALIZER, small))
                kept += len(parts[-1])
                run = stop
        if kept + stop - run > limits.onnx_graph_bytes:
            raise _too_large(
                file, f"has more than {limits.onnx_graph_bytes} bytes besides its initializers"
            )
    parts.append(buffer[run:end])
    skeleton = b"".join([*around, _field(_GRAPH, b"".join(parts))])
    return Outline(tuple(found), nodes, skeleton)


def _scan_tensor(reader: _Reader, at: int, end: int) -> tuple[Initializer, tuple[int, int] | None]:
    """An initializer, and where its raw data stands if that is too large to keep."""
    dims: list[int] = []
    once: dict[int, int] = {}
    name, external = "", list[tuple[str, str]]()
    raw: tuple[int, int, int] | None = None
    has_typed = False
    for number, kind, begin, start, stop in reader.fields(at, end):
        if number not in _TENSOR_FIELDS or (number in _ONCE and number in once):
            raise reader.refuse(f"holds the tensor field {number} wrongly or twice")
        once[number] = start
        if number == _DIMS and kind == VARINT:
            dims.append(start)
        elif number == _DIMS and kind == BYTES:
            while start < stop:
                value, start = reader.varint(start, stop)
                dims.append(value)
        elif number == _NAME and kind == BYTES:
            name = reader.text(start, stop)
        elif number == _RAW and kind == BYTES:
            raw = (begin, start, stop)
        elif number == _EXTERNAL and kind == BYTES:
            external.append(_scan_entry(reader, start, stop))
        elif number in _TYPED_DATA:
            has_typed = True
        elif number in (_DATA_TYPE, _LOCATION) and kind != VARINT:
            raise reader.refuse(f"holds the tensor field {number} in another form")
        if len(dims) > reader.limits.tensor_rank:
            raise reader.refuse(f"holds a tensor of more than {reader.limits.tensor_rank} sizes")
    is_external = once.get(_LOCATION, 0)
    data_type = once.get(_DATA_TYPE, 0)
    if data_type not in ELEMENT_BITS or is_external not in (0, 1) or not name:
        raise reader.refuse(f"holds the tensor {quote(name)} of type {data_type}")
    nbytes = tensor_bytes(data_type, dims)
    if nbytes is None:
        raise reader.refuse(f"holds the tensor {quote(name)} of impossible size {quote(dims)}")
    given = raw[2] - raw[1] if raw else 0
    if is_external and (raw or has_typed):
        raise reader.refuse(f"holds the tensor {quote(name)} twice, inside and outside")
    if not is_external and (external or (not has_typed and given != nbytes)):
        raise reader.refuse(
            f"holds {given} bytes of the tensor {quote(name)}, which needs {nbytes}"
        )
    initializer = Initializer(
        name, data_type, tuple(dims), nbytes, tuple(external) if is_external else None
    )
    cut = (raw[0], raw[2]) if raw and given > _KEPT_BYTES else None
    return initializer, cut


def _scan_entry(reader: _Reader, at: int, end: int) -> tuple[str, str]:
    """One StringStringEntryProto."""
    found: dict[int, str] = {}
    for number, kind, _, start, stop in reader.fields(at, end):
        if number not in (1, 2) or kind != BYTES or number in found:
            raise reader.refuse(f"holds the entry field {number}")
        found[number] = reader.text(start, stop)
    return found.get(1, ""), found.get(2, "")


def tensor_bytes(data_type: int, dims: list[int] | tuple[int, ...]) -> int | None:
    """Bytes of a tensor, sub-byte types packed; None for sizes that cannot be."""
    if any(size < 0 or size > 1 << 40 for size in dims):
        return None
    bits = math.prod(dims) * ELEMENT_BITS[data_type]
    return (bits + 7) // 8 if bits <= 1 << 50 else None


def _too_large(file: OpenFile, what: str) -> LimitError:
    return LimitError(f"{file.name} {what}", code="onnx-too-large")


def _field(number: int, content: bytes) -> bytes:
    return _encoded(number << 3 | BYTES) + _encoded(len(content)) + content


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
