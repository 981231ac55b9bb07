"""The experts of ``transformers`` models: a matrix product per expert over the rows it gets.

``transformers::grouped_mm_fallback(input, weight, offs)``: rows of ``input`` (S, K) are sorted by
expert, ``offs[e]`` is where those of expert e end, ``weight`` is (E, K, N).
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import onnx, translates


@translates("transformers::grouped_mm_fallback")
def grouped_mm_fallback(rows: ir.Value, weight: ir.Value, offsets: ir.Value) -> Any:
    ends = onnx.Cast(offsets, to=ir.DataType.INT64)
    axis = onnx.Constant(value_ints=[0])
    start = axis
    products = []
    for expert in range(int(weight.shape[0])):
        first, last = (onnx.Constant(value_ints=[expert + i]) for i in (0, 1))
        end = onnx.Slice(ends, first, last, axis)
        matrix = onnx.Gather(weight, onnx.Constant(value_int=expert), axis=0)
        products.append(onnx.MatMul(onnx.Slice(rows, start, end, axis), matrix))
        start = end
    return onnx.Concat(*products, axis=0)
