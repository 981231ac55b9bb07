"""``mopt::embedding_int8``: gather rows of codes and of scales, then multiply."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mopt.backends.onnx.translate import onnx, translates


@translates("mopt::embedding_int8")
def embedding_int8(indices: ir.Value, codes: ir.Value, scales: ir.Value) -> Any:
    width, blocks = int(codes.shape[1]), int(scales.shape[1])
    rows = onnx.Cast(onnx.Gather(codes, indices, axis=0), to=scales.dtype)
    steps = onnx.Gather(scales, indices, axis=0)
    if blocks == 1:
        return onnx.Mul(rows, steps)
    block = -(-width // blocks)
    # Each step is repeated over its block, and the last, shorter block cut to size.
    lead = [0] * len(indices.shape)
    widened = onnx.Reshape(
        onnx.Expand(
            onnx.Unsqueeze(steps, onnx.Constant(value_ints=[-1])),
            onnx.Constant(value_ints=[1] * (len(lead) + 1) + [block]),
        ),
        onnx.Constant(value_ints=[*lead, blocks * block]),
    )
    if blocks * block != width:
        widened = onnx.Slice(
            widened,
            onnx.Constant(value_ints=[0]),
            onnx.Constant(value_ints=[width]),
            onnx.Constant(value_ints=[-1]),
        )
    return onnx.Mul(rows, widened)
