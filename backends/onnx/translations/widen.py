"""``mopt::widen`` is a Cast, which ONNX Runtime computes once, when it loads the model."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import onnx, translates


@translates("mopt::widen")
def widen(weight: ir.Value, dtype: int) -> Any:
    return onnx.Cast(weight, to=dtype)
