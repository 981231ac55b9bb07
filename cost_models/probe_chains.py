"""How the models of probes are built: pieces of networks whose operators hand values over.

A single operator finds its input where it left its output, in the cache of the core that wrote it.
In a model it reads what another operator wrote, partly on another core, and weights that were last
read a whole run ago. These pieces show what that costs. Their sizes start with the number format of
the products, an index of ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mopt.cost_models.probe_models import MICROSOFT, Dims, ProbeModel, builds, same_pads

FORMATS = ("fp32", "int8", "int4")
_BLOCK = 32
_EXPANSION = 4


@builds("chain.encoder")
def _encoder(model: ProbeModel, dims: Dims) -> bytes:
    """Attention and a perceptron with residuals: (format, rows, width, heads)."""
    form, rows, width, heads = FORMATS[dims[0]], *dims[1:]
    x = model.give(1, rows, width)
    for _ in range(model.copies):
        q, k, v = _products(model, form, _norm(model, x, width), (rows, width, width), 3)
        y = model.add("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads)
        x = model.add("Add", x, _product(model, form, y, (rows, width, width)))
        y = _product(model, form, _norm(model, x, width), (rows, _EXPANSION * width, width))
        y = _product(model, form, model.add("Gelu", y), (rows, width, _EXPANSION * width))
        x = model.add("Add", x, y)
    return model.finish(x)


@builds("chain.decoder")
def _decoder(model: ProbeModel, dims: Dims) -> bytes:
    """Causal attention and a gated perceptron: (format, rows, width, heads)."""
    form, rows, width, heads = FORMATS[dims[0]], *dims[1:]
    inner = _EXPANSION * width * 2 // 3 // _BLOCK * _BLOCK
    x = model.give(1, rows, width)
    last, total = model.constant(np.full(1, rows - 1, np.int32)), model.constant(np.int32(rows))
    for _ in range(model.copies):
        y = model.add("RMSNormalization", x, model.store(width), axis=-1)
        q, k, v = _products(model, form, y, (rows, width, width), 3)
        y = model.add(
            "GroupQueryAttention", q, k, v, "", "", last, total, domain=MICROSOFT,
            num_heads=heads, kv_num_heads=heads,
        )  # fmt: skip
        x = model.add("Add", x, _product(model, form, y, (rows, width, width)))
        y = model.add("RMSNormalization", x, model.store(width), axis=-1)
        gate, value = _products(model, form, y, (rows, inner, width), 2)
        gate = model.add("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)
        y = _product(model, form, model.add("Mul", gate, value), (rows, width, inner))
        x = model.add("Add", x, y)
    return model.finish(x)


@builds("chain.residual")
def _residual(model: ProbeModel, dims: Dims) -> bytes:
    """Two 3 x 3 convolutions with a residual: (format, channels, size); int8 is channels-last."""
    form, channels, size = FORMATS[dims[0]], *dims[1:]
    if form != "fp32":
        return _residual_int8(model, channels, size)
    x = model.give(1, channels, size, size)
    for _ in range(model.copies):
        y = model.add("Relu", _convolution(model, x, channels, channels, 3))
        y = _convolution(model, y, channels, channels, 3)
        x = model.add("Relu", model.add("Add", x, y))
    return model.finish(x)


def _residual_int8(model: ProbeModel, channels: int, size: int) -> bytes:
    x = model.give(1, size, size, channels, dtype="uint8")
    for _ in range(model.copies):
        y = _convolution_int8(model, _convolution_int8(model, x, channels), channels)
        zero = model.constant(np.uint8(128))
        x = model.add(
            "QLinearAdd", x, model.scale(), zero, y, model.scale(), zero, model.scale(), zero,
            domain=MICROSOFT,
        )  # fmt: skip
    return model.finish(x, kind="uint8")


@builds("chain.separable")
def _separable(model: ProbeModel, dims: Dims) -> bytes:
    """Inverted residuals with depthwise convolutions: (format, channels, size), fp32 only."""
    _, channels, size = dims
    wide = 6 * channels
    x = model.give(1, channels, size, size)
    for _ in range(model.copies):
        y = model.add("Relu", _convolution(model, x, wide, channels, 1))
        y = model.add("Relu", _convolution(model, y, wide, wide, 3, group=wide))
        x = model.add("Add", x, _convolution(model, y, channels, wide, 1))
    return model.finish(x)


def _product(model: ProbeModel, form: str, x: str, sizes: Dims) -> str:
    return _products(model, form, x, sizes, 1)[0]


def _products(model: ProbeModel, form: str, x: str, sizes: Dims, count: int) -> Sequence[str]:
    """Linear layers (rows, outputs, inputs) that read one value of (1, rows, inputs)."""
    rows, outputs, inputs = sizes
    if form == "fp32":
        flat = model.add("Reshape", x, model.constant(np.array([rows, inputs], np.int64)))
        shape = model.constant(np.array([1, rows, outputs], np.int64))
        return [
            model.add(
                "Reshape",
                model.add("Gemm", flat, model.store(inputs, outputs), model.store(outputs)), shape,
            )
            for _ in range(count)
        ]  # fmt: skip
    if form == "int4":
        blocks = inputs // _BLOCK
        return [
            model.add(
                "MatMulNBits", x, model.store(outputs, blocks, _BLOCK // 2, dtype="uint8"),
                model.scale(outputs, blocks), "", "", model.store(outputs), domain=MICROSOFT,
                K=inputs, N=outputs, bits=4, block_size=_BLOCK, accuracy_level=4,
            )
            for _ in range(count)
        ]  # fmt: skip
    if count == 1:
        codes = model.store(inputs, outputs, dtype="int8")
        arguments = (x, codes, model.scale(outputs), "", model.store(outputs))
        return [model.add("DynamicQuantizeMatMul", *arguments, domain=MICROSOFT)]
    codes, scale, zero = model.add_all("DynamicQuantizeLinear", x, results=3)
    return [
        model.add(
            "MatMulIntegerToFloat", codes, model.store(inputs, outputs, dtype="int8"), scale,
            model.scale(outputs), zero, "", model.store(outputs), domain=MICROSOFT,
        )
        for _ in range(count)
    ]  # fmt: skip


def _norm(model: ProbeModel, x: str, width: int) -> str:
    return model.add("LayerNormalization", x, model.store(width), model.store(width), axis=-1)


def _convolution(
    model: ProbeModel, x: str, outputs: int, inputs: int, kernel: int, group: int = 1
) -> str:
    return model.add(
        "Conv", x, model.store(outputs, inputs // group, kernel, kernel), model.store(outputs),
        kernel_shape=[kernel] * 2, group=group, pads=same_pads(kernel, kernel),
    )  # fmt: skip


def _convolution_int8(model: ProbeModel, x: str, channels: int) -> str:
    zero = model.constant(np.uint8(128))
    return model.add(
        "QLinearConv", x, model.scale(), zero,
        model.store(channels, channels, 3, 3, dtype="int8"), model.scale(channels),
        model.constant(np.zeros(channels, np.int8)), model.scale(), zero,
        model.constant(np.zeros(channels, np.int32)), domain=MICROSOFT, channels_last=1,
        kernel_shape=[3, 3], pads=same_pads(3, 3),
    )  # fmt: skip
