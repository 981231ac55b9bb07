"""``mopt::decode_levels`` looks values up in a table, which ONNX Runtime does when it loads.

There is no kernel that reads such codes: the file stays as small as they are, speed and memory are
those of a float layer.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import onnx, translates
from mopt.levels import levels


@translates("mopt::decode_levels")
def decode_levels(
    codes: ir.Value,
    scales: ir.Value,
    tables: ir.Value | None,
    tensor_scale: ir.Value | None,
    kind: str,
    scale_kind: str,
    columns: int,
) -> Any:
    found = levels(kind)
    rows, blocks, block_bytes = codes.shape.numpy()
    block = block_bytes * 8 // found.bits
    index = _index(_unpacked_codes(codes, found.bits, [rows, blocks, block]))
    if tables is not None:
        padded = int(tables.shape[1]) * 4
        chosen = _index(_first_columns(_unpacked_codes(tables, 2, [rows, padded]), blocks))
        offset = onnx.Mul(chosen, onnx.Constant(value_int=2**found.bits))
        index = onnx.Add(index, onnx.Unsqueeze(offset, onnx.Constant(value_ints=[-1])))
    values = onnx.Gather(_table(kind), index, axis=0)
    steps = scales
    if scale_kind != "float32":
        steps = onnx.Gather(_table(scale_kind), _index(scales), axis=0)
    if tensor_scale is not None:
        steps = onnx.Mul(steps, tensor_scale)
    weight = onnx.Mul(values, onnx.Unsqueeze(steps, onnx.Constant(value_ints=[-1])))
    flat = onnx.Reshape(weight, onnx.Constant(value_ints=[rows, blocks * block]))
    return flat if blocks * block == columns else _first_columns(flat, columns)


def _unpacked_codes(packed: ir.Value, bits: int, shape: list[int]) -> Any:
    """uint8 codes of ``shape``, unpacked along the last axis, low bits first."""
    if bits == 8:
        return packed
    shifts = onnx.Constant(value=ir.tensor(range(0, 8, bits), dtype=ir.DataType.UINT8))
    mask = onnx.Constant(value=ir.tensor([2**bits - 1], dtype=ir.DataType.UINT8))
    spread = onnx.Unsqueeze(packed, onnx.Constant(value_ints=[-1]))
    codes = onnx.BitwiseAnd(onnx.BitShift(spread, shifts, direction="RIGHT"), mask)
    return onnx.Reshape(codes, onnx.Constant(value_ints=shape))


def _first_columns(value: Any, count: int) -> Any:
    """The first ``count`` along the last axis."""
    start, end, axis = (onnx.Constant(value_ints=[v]) for v in (0, count, -1))
    return onnx.Slice(value, start, end, axis)


def _index(codes: Any) -> Any:
    return onnx.Cast(codes, to=ir.DataType.INT64)


def _table(kind: str) -> Any:
    values = levels(kind).tables.reshape(-1).tolist()
    return onnx.Constant(value=ir.tensor(values, dtype=ir.DataType.FLOAT))
