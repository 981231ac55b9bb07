"""``mopt::grouped_linear_nbits``: one MatMulNBits per expert over the rows it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import onnx, translates
from mopt.backends.onnx.translations.linear_nbits import linear_nbits


@translates("mopt::grouped_linear_nbits")
def grouped_linear_nbits(
    x: ir.Value,
    ends: ir.Value,
    codes: Sequence[ir.Value],
    scales: Sequence[ir.Value],
    bits: Sequence[int],
    in_features: int,
    activations: str,
) -> Any:
    last = onnx.Cast(ends, to=ir.DataType.INT64)
    axis = onnx.Constant(value_ints=[0])
    start = axis
    products = []
    for expert, (own, steps, width) in enumerate(zip(codes, scales, bits, strict=True)):
        first, after = (onnx.Constant(value_ints=[expert + i]) for i in (0, 1))
        end = onnx.Slice(last, first, after, axis)
        rows = onnx.Slice(x, start, end, axis)
        products.append(linear_nbits(rows, own, steps, None, None, width, in_features, activations))
        start = end
    return onnx.Concat(*products, axis=0)
