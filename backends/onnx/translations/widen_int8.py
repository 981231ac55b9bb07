"""``mopt::widen_int8`` is a Cast and a product, which ONNX Runtime computes once, when it loads."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import onnx, translates


@translates("mopt::widen_int8")
def widen_int8(codes: ir.Value, scales: ir.Value) -> Any:
    rank = len(codes.shape.numpy())
    steps = onnx.Reshape(scales, onnx.Constant(value_ints=[-1] + [1] * (rank - 1)))
    return onnx.Mul(onnx.Cast(codes, to=scales.dtype), steps)
