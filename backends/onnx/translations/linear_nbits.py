"""``mopt::linear_nbits`` is ONNX Runtime's MatMulNBits, which has the same packing."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import contributed, onnx, translates

# What a kernel may do to the activations: 4 lets it round them to int8 per row and block, 1 asks
# for float32 arithmetic. The choice is always written down: unset leaves it to the runtime.
_ACCURACY = {"float": 1, "int8": 4}
# Only these have a float kernel. The others unpack the whole weight in every call: 7.5 ms at 8 bits
# against 0.59 for the float32 product of one token with 2048 x 2048 weights.
_FLOAT_KERNEL_BITS = (4,)


@translates("mopt::linear_nbits")
def linear_nbits(
    x: ir.Value,
    codes: ir.Value,
    scales: ir.Value,
    zero_points: ir.Value | None,
    bias: ir.Value | None,
    bits: int,
    in_features: int,
    activations: str,
) -> Any:
    rows, _, block_bytes = codes.shape.numpy()
    if activations == "float" and bits not in _FLOAT_KERNEL_BITS:
        weight = _unpacked_weight(codes, scales, zero_points, bits, in_features)
        product = onnx.MatMul(x, onnx.Transpose(weight, perm=[1, 0]))
        return product if bias is None else onnx.Add(product, bias)
    return contributed(
        "MatMulNBits",
        x,
        codes,
        scales,
        zero_points,
        None,
        bias,
        K=in_features,
        N=rows,
        bits=bits,
        block_size=block_bytes * 8 // bits,
        accuracy_level=_ACCURACY[activations],
    )


def _unpacked_weight(
    codes: ir.Value, scales: ir.Value, zero_points: ir.Value | None, bits: int, in_features: int
) -> Any:
    """The float weight (rows, in_features), which ONNX Runtime computes once, when it loads.

    The file stays as small as the codes; speed and memory are those of a float layer.
    """
    rows, blocks, block_bytes = codes.shape.numpy()
    block = block_bytes * 8 // bits
    values = onnx.Cast(unpacked_codes(codes, bits, [rows, blocks, block]), to=scales.dtype)
    if zero_points is None:
        zero = onnx.CastLike(onnx.Constant(value_float=float(2 ** (bits - 1))), scales)
    else:
        padded = int(zero_points.shape[1]) * 8 // bits
        zero = onnx.Cast(unpacked_codes(zero_points, bits, [rows, padded]), to=scales.dtype)
        zero = onnx.Unsqueeze(first_columns(zero, blocks), onnx.Constant(value_ints=[-1]))
    steps = onnx.Unsqueeze(scales, onnx.Constant(value_ints=[-1]))
    weight = onnx.Mul(onnx.Sub(values, zero), steps)
    flat = onnx.Reshape(weight, onnx.Constant(value_ints=[rows, blocks * block]))
    return flat if blocks * block == in_features else first_columns(flat, in_features)


def unpacked_codes(packed: ir.Value, bits: int, shape: list[int]) -> Any:
    """uint8 codes of ``shape``, unpacked along the last axis, low bits first."""
    if bits == 8:
        return packed
    shifts = onnx.Constant(value=ir.tensor(range(0, 8, bits), dtype=ir.DataType.UINT8))
    mask = onnx.Constant(value=ir.tensor([2**bits - 1], dtype=ir.DataType.UINT8))
    spread = onnx.Unsqueeze(packed, onnx.Constant(value_ints=[-1]))
    codes = onnx.BitwiseAnd(onnx.BitShift(spread, shifts, direction="RIGHT"), mask)
    return onnx.Reshape(codes, onnx.Constant(value_ints=shape))


def first_columns(value: Any, count: int) -> Any:
    """The first ``count`` along the last axis."""
    start, end, axis = (onnx.Constant(value_ints=[v]) for v in (0, count, -1))
    return onnx.Slice(value, start, end, axis)
