"""``mopt::linear_nbits`` is ONNX Runtime's MatMulNBits, which has the same packing."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import contributed, translates

# What a kernel may do to the activations: 4 lets it round them to int8 per row and block, 1 asks
# for float32 arithmetic. WIDENED, which nothing else has, leaves it to a rewrite that knows the
# codes to widen them when the model is loaded.
_ACCURACY = {"float": 1, "int8": 4}
WIDENED = 0
# Only these have a float kernel, which is faster than the float product for a single row: for more,
# 1.2 to 1.6 times slower. The others unpack the whole weight in every call: 7.5 ms at 8 bits
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
    accuracy = _ACCURACY[activations]
    if activations == "float" and not (bits in _FLOAT_KERNEL_BITS and _is_one_row(x)):
        accuracy = WIDENED
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
        accuracy_level=accuracy,
    )


def _is_one_row(x: ir.Value) -> bool:
    """Whether a value is a single vector; a size that varies may be anything."""
    return x.shape is not None and all(size == 1 for size in x.shape[:-1])
