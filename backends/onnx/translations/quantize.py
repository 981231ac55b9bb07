"""``mopt::quantize`` is ONNX's QuantizeLinear."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import onnx, translates


@translates("mopt::quantize")
def quantize(x: ir.Value, scale: ir.Value, zero_point: ir.Value, axis: int) -> Any:
    return onnx.QuantizeLinear(x, scale, zero_point, axis=axis)
