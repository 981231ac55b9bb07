"""Writes an ONNX file one weight after another.

protobuf builds a message as a whole and then its bytes as a whole: for a moment the weights lie in
memory three times. A message is the concatenation of its fields, so each weight can be written as
a field of its own, and only one is there twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

# Fields of onnx.proto that hold bytes (wire type 2): ModelProto.graph, GraphProto.initializer,
# TensorProto.raw_data.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
# Smaller tensors are serialized as they are: copies of them do not matter.
_LARGE_BYTES = 1 << 16


def write_model(model: ir.Model, path: Path) -> None:
    """Write ``model`` with its weights inside the file, in the same bytes each time.

    Takes the initializers out of the model's graph, in order to write the rest without them.
    Memory: the bytes of the graph without weights and of the largest weight.
    """
    initializers = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    proto = ir.to_proto(model)
    rest = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    weights = []
    for value in initializers:
        if value.const_value is not None:
            value.const_value.name = value.name
            weights.append(_Weight(value.const_value))
    with path.open("wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
        file.write(_header(_GRAPH, len(rest) + sum(weight.size for weight in weights)))
        file.write(rest)
        for weight in weights:
            weight.write(file)


class _Weight:
    """One initializer as a field of the graph: ``size`` bytes with its header."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self._tensor: ir.TensorProtocol | None = None
        proto = onnx.TensorProto()
        if (
            isinstance(tensor, ir.TensorProtoTensor | ir.StringTensor)
            or tensor.nbytes < _LARGE_BYTES
        ):
            ir.serde.serialize_tensor_into(proto, tensor)
            begin, inside = proto.SerializeToString(deterministic=True), 0
        else:
            proto.name = tensor.name or ""
            proto.data_type = tensor.dtype.value
            proto.dims.extend(tensor.shape.numpy())
            self._tensor, inside = tensor, tensor.nbytes
            begin = proto.SerializeToString(deterministic=True) + _header(_RAW_DATA, inside)
        self._begin = _header(_INITIALIZER, len(begin) + inside) + begin
        self.size = len(self._begin) + inside

    def write(self, file: BinaryIO) -> None:
        file.write(self._begin)
        if self._tensor is not None:
            data = self._tensor.tobytes()
            if len(data) != self._tensor.nbytes:
                raise ValueError(f"{self._tensor.name} has {len(data)} bytes, not its nbytes")
            file.write(data)


def _header(field: int, size: int) -> bytes:
    """Tag and length of a field of ``size`` bytes."""
    found, number = bytearray([field << 3 | 2]), size
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(found) + bytes([number])
