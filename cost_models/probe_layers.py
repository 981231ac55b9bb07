"""How the models of probes are built: layers with weights, products, attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mopt.cost_models.probe_models import MICROSOFT, Dims, ProbeModel, builds, same_pads


@builds("tap")
def _tap(model: ProbeModel, dims: Dims) -> bytes:
    x = model.give(model.copies, 64)
    for i in range(model.copies):
        model.tap_at(x, (i, 0))
    return model.finish()


@builds("linear.fp32")
def _linear(model: ProbeModel, dims: Dims) -> bytes:
    rows, outputs, inputs = dims
    x = model.give(rows, inputs)
    for _ in range(model.copies):
        model.tap(model.add("Gemm", x, model.store(inputs, outputs), model.store(outputs)), 2)
    return model.finish()


@builds("linear.fp32-bare")
def _linear_bare(model: ProbeModel, dims: Dims) -> bytes:
    rows, outputs, inputs = dims
    x = model.give(rows, inputs)
    for _ in range(model.copies):
        model.tap(model.add("MatMul", x, model.store(inputs, outputs)), 2)
    return model.finish()


@builds("linear.int8-dynamic")
def _linear_dynamic(model: ProbeModel, dims: Dims) -> bytes:
    rows, outputs, inputs = dims
    x = model.give(rows, inputs)
    for _ in range(model.copies):
        codes = model.store(inputs, outputs, dtype="int8")
        arguments = (x, codes, model.scale(outputs), "", model.store(outputs))
        model.tap(model.add("DynamicQuantizeMatMul", *arguments, domain=MICROSOFT), 2)
    return model.finish()


@builds("linear.int8-shared")
def _linear_shared(model: ProbeModel, dims: Dims) -> bytes:
    rows, outputs, inputs = dims
    x = model.give(rows, inputs, dtype="uint8")
    for _ in range(model.copies):
        codes = model.store(inputs, outputs, dtype="int8")
        zero = model.constant(np.uint8(128))
        arguments = (x, codes, model.scale(), model.scale(outputs), zero, "", model.store(outputs))
        model.tap(model.add("MatMulIntegerToFloat", *arguments, domain=MICROSOFT), 2)
    return model.finish()


@builds("linear.int8-static")
def _linear_static(model: ProbeModel, dims: Dims) -> bytes:
    rows, outputs, inputs = dims
    x = model.give(rows, inputs, dtype="uint8")
    for _ in range(model.copies):
        zero = model.constant(np.uint8(128))
        result = model.add(
            "QGemm", x, model.scale(), zero, model.store(inputs, outputs, dtype="int8"),
            model.scale(outputs), model.constant(np.zeros(outputs, np.int8)),
            model.constant(np.zeros(outputs, np.int32)), model.scale(), zero, domain=MICROSOFT,
        )  # fmt: skip
        model.tap(result, 2)
    return model.finish(kind="uint8")


def _blocks(bits: int, level: int, model: ProbeModel, dims: Dims) -> bytes:
    rows, outputs, inputs, block = dims
    count = -(-inputs // block)
    x = model.give(rows, inputs)
    for _ in range(model.copies):
        codes = model.store(outputs, count, block * bits // 8, dtype="uint8")
        arguments = (x, codes, model.scale(outputs, count), "", "", model.store(outputs))
        result = model.add(
            "MatMulNBits", *arguments, domain=MICROSOFT,
            K=inputs, N=outputs, bits=bits, block_size=block, accuracy_level=level,
        )  # fmt: skip
        model.tap(result, 2)
    return model.finish()


for _bits in (2, 4, 8):
    builds(f"linear.int{_bits}-blocks")(partial(_blocks, _bits, 4))
builds("linear.int4-float")(partial(_blocks, 4, 1))


@builds("matmul.fp32")
def _matmul(model: ProbeModel, dims: Dims) -> bytes:
    batches, rows, columns, inner = dims
    x = model.give(batches, rows, inner)
    for _ in range(model.copies):
        model.tap(model.add("MatMul", x, model.give(batches, inner, columns)), 3)
    return model.finish()


@builds("attention.full")
def _attention(model: ProbeModel, dims: Dims) -> bytes:
    batch, heads, queries, keys, width = dims
    k, v = (model.give(batch, keys, heads * width) for _ in range(2))
    value = model.give(batch, queries, heads * width)
    for _ in range(model.copies):
        value = model.add("Attention", value, k, v, q_num_heads=heads, kv_num_heads=heads)
    return model.finish(value)


@builds("attention.causal")
def _causal(model: ProbeModel, dims: Dims) -> bytes:
    batch, heads, queries, _, width = dims
    k, v = (model.give(batch, queries, heads * width) for _ in range(2))
    value = model.give(batch, queries, heads * width)
    last = model.constant(np.full(batch, queries - 1, np.int32))
    total = model.constant(np.int32(queries))
    for _ in range(model.copies):
        value = model.add(
            "GroupQueryAttention", value, k, v, "", "", last, total, domain=MICROSOFT,
            num_heads=heads, kv_num_heads=heads,
        )  # fmt: skip
    return model.finish(value)


@builds("convolution.fp32", "convolution.depthwise")
def _convolution(model: ProbeModel, dims: Dims) -> bytes:
    batch, inputs, outputs, groups, height, width, kernel_h, kernel_w, stride = dims
    x = model.give(batch, inputs, height * stride, width * stride)
    for _ in range(model.copies):
        weight = model.store(outputs, inputs // groups, kernel_h, kernel_w)
        y = model.add(
            "Conv", x, weight, model.store(outputs), kernel_shape=[kernel_h, kernel_w],
            group=groups, strides=[stride] * 2, pads=same_pads(kernel_h, kernel_w),
        )  # fmt: skip
        # Stays in the blocked layout of the convolution and leaves one position of it.
        y = model.add("MaxPool", y, kernel_shape=[1, 1], strides=[height, width])
        model.tap(y, 4)
    return model.finish()


@builds("convolution.plain")
def _plain_convolution(model: ProbeModel, dims: Dims) -> bytes:
    """One and three dimensions have no blocked layout; two that are 1 stand for a line."""
    batch, inputs, outputs, groups, *sizes = dims
    half = len(sizes) // 2
    places, kernel = sizes[:half], sizes[half:]
    x = model.give(batch, inputs, *places)
    for _ in range(model.copies):
        weight = model.store(outputs, inputs // groups, *kernel)
        y = model.add(
            "Conv", x, weight, model.store(outputs), kernel_shape=kernel, group=groups,
            pads=same_pads(*kernel),
        )  # fmt: skip
        model.tap(y, half + 2)
    return model.finish()


@builds("convolution.transposed")
def _transposed(model: ProbeModel, dims: Dims) -> bytes:
    batch, inputs, outputs, _, height, width, kernel_h, kernel_w, stride = dims
    x = model.give(batch, inputs, height // stride, width // stride)
    for _ in range(model.copies):
        weight = model.store(inputs, outputs, kernel_h, kernel_w)
        y = model.add(
            "ConvTranspose", x, weight, model.store(outputs), kernel_shape=[kernel_h, kernel_w],
            strides=[stride] * 2,
        )  # fmt: skip
        model.tap(y, 4)
    return model.finish()


@builds("convolution.int8", "convolution.int8-depthwise")
def _convolution_int8(model: ProbeModel, dims: Dims) -> bytes:
    batch, inputs, outputs, groups, height, width, kernel_h, kernel_w, stride = dims
    x = model.give(batch, height * stride, width * stride, inputs, dtype="uint8")
    for _ in range(model.copies):
        zero = model.constant(np.uint8(128))
        y = model.add(
            "QLinearConv", x, model.scale(), zero,
            model.store(outputs, inputs // groups, kernel_h, kernel_w, dtype="int8"),
            model.scale(outputs), model.constant(np.zeros(outputs, np.int8)), model.scale(), zero,
            model.constant(np.zeros(outputs, np.int32)), domain=MICROSOFT, channels_last=1,
            kernel_shape=[kernel_h, kernel_w], group=groups, strides=[stride] * 2,
            pads=same_pads(kernel_h, kernel_w),
        )  # fmt: skip
        model.tap(y, 4)
    return model.finish(kind="uint8")


@builds("embedding.fp32")
def _embedding(model: ProbeModel, dims: Dims) -> bytes:
    rows, width = dims
    below = max((1 << 22) // width, 2)
    table = model.store(below, width)
    for _ in range(model.copies):
        model.tap(model.add("Gather", table, model.give_indices(rows, below=below)), 2)
    return model.finish()


def _recurrent(operator: str, gates: int, model: ProbeModel, dims: Dims) -> bytes:
    steps, batch, inputs, hidden, directions = dims
    x = model.give(steps, batch, inputs)
    for _ in range(model.copies):
        arguments = (
            model.store(directions, gates * hidden, inputs),
            model.store(directions, gates * hidden, hidden),
            model.store(directions, 2 * gates * hidden),
        )
        more: dict[str, Any] = {"linear_before_reset": 1} if operator == "GRU" else {}
        direction = "bidirectional" if directions == 2 else "forward"
        model.tap(model.add(operator, x, *arguments, hidden_size=hidden, direction=direction,
                            **more), 4)  # fmt: skip
    return model.finish()


builds("recurrent.lstm")(partial(_recurrent, "LSTM", 4))
builds("recurrent.gru")(partial(_recurrent, "GRU", 3))
