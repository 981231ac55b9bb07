"""``mopt::dequantize`` is ONNX's DequantizeLinear."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import onnx, translates


@translates("mopt::dequantize")
def dequantize(q: ir.Value, scale: ir.Value, zero_point: ir.Value, axis: int) -> Any:
    return onnx.DequantizeLinear(q, scale, zero_point, axis=axis)
