"""``mopt::linear_dynamic_int8`` is ONNX Runtime's DynamicQuantizeMatMul."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import contributed, onnx, translates


@translates("mopt::linear_dynamic_int8")
def linear_dynamic_int8(
    x: ir.Value, codes: ir.Value, scales: ir.Value, bias: ir.Value | None
) -> Any:
    weight = onnx.Transpose(codes, perm=[1, 0])
    return contributed("DynamicQuantizeMatMul", x, weight, scales, None, bias)
