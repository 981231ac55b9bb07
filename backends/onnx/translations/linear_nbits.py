"""``mopt::linear_nbits`` is ONNX Runtime's MatMulNBits, which has the same packing."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from mopt.backends.onnx.translate import contributed, translates

# What a kernel may do to the activations: 4 lets it round them to int8 per row and block, 1 asks
# for float32 arithmetic. The choice is always written down: unset leaves it to the runtime.
_ACCURACY = {"float": 1, "int8": 4}


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
