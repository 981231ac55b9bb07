"""How the model of a probe is built, by family; the sizes are those of ``families``."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mopt.cost_models.probe_models import BUILDERS, MICROSOFT, Dims, ProbeModel, builds


def build_probe(family: str, dims: Dims, copies: int) -> tuple[bytes, dict[str, np.ndarray], int]:
    """The serialized model of a probe, its inputs and its number of taps."""
    model = ProbeModel(copies)
    built = BUILDERS[family](model, dims)
    return built, model.inputs, model.taps


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
            "GroupQueryAttention", value, k, v, "", "", last, total, domain=MICROSOFT, results=3,
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
            group=groups, strides=[stride] * 2, pads=_pads(kernel_h, kernel_w),
        )  # fmt: skip
        # Stays in the blocked layout of the convolution and leaves one position of it.
        y = model.add("MaxPool", y, kernel_shape=[1, 1], strides=[height, width])
        model.tap(y, 4)
    return model.finish()


def _pads(*kernel: int) -> list[int]:
    before = [(size - 1) // 2 for size in kernel]
    return [*before, *(size - 1 - pad for size, pad in zip(kernel, before, strict=True))]


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
            pads=_pads(*kernel),
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
            pads=_pads(kernel_h, kernel_w),
        )  # fmt: skip
        model.tap(y, 4)
    return model.finish(kind="uint8")


# ---- operators on rows and on single values


def _chain(model: ProbeModel, shape: Dims, operator: str, *more: str, **attributes: Any) -> bytes:
    value = model.give(*shape)
    for _ in range(model.copies):
        value = model.add(operator, value, *more, **attributes)
    return model.finish(value)


@builds("norm.layer")
def _norm(model: ProbeModel, dims: Dims) -> bytes:
    weights = [model.store(dims[1]) for _ in range(2)]
    return _chain(model, dims, "LayerNormalization", *weights, axis=-1)


@builds("norm.rms")
def _rms(model: ProbeModel, dims: Dims) -> bytes:
    return _chain(model, dims, "RMSNormalization", model.store(dims[1]), axis=-1)


@builds("norm.skip")
def _skip_norm(model: ProbeModel, dims: Dims) -> bytes:
    shape = (1, *dims)
    value, other = model.give(*shape), model.give(*shape)
    weights = [model.store(dims[1]) for _ in range(2)]
    for _ in range(model.copies):
        value = model.add("SkipLayerNormalization", value, other, *weights, domain=MICROSOFT)
    return model.finish(value)


@builds("norm.batch")
def _batch_norm(model: ProbeModel, dims: Dims) -> bytes:
    weights = [model.constant(np.ones(dims[0], np.float32)) for _ in range(4)]
    return _chain(model, (1, *dims), "BatchNormalization", *weights)


@builds("softmax.last")
def _softmax(model: ProbeModel, dims: Dims) -> bytes:
    return _chain(model, dims, "Softmax", axis=-1)


_UNARY = {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "erf": "Erf", "sqrt": "Sqrt",
    "gelu": "Gelu", "silu": "QuickGelu", "hardsigmoid": "HardSigmoid", "floor": "Floor",
}  # fmt: skip
# Doing them twice is simplified away, or leaves numbers that are not usual ones.
_ONCE = ("Relu", "Floor", "Sqrt")


def _unary(operator: str, model: ProbeModel, dims: Dims) -> bytes:
    domain = MICROSOFT if operator == "QuickGelu" else ""
    value = model.give(*dims)
    if operator in _ONCE:
        for _ in range(model.copies):
            model.tap(model.add(operator, model.give(*dims)), len(dims))
        return model.finish()
    value = model.give(*dims)
    for _ in range(model.copies):
        value = model.add(operator, value, domain=domain)
    return model.finish(value)


for _name, _operator in _UNARY.items():
    builds(f"pointwise.{_name}")(partial(_unary, _operator))


@builds("pointwise.add")
def _add(model: ProbeModel, dims: Dims) -> bytes:
    return _chain(model, dims, "Add", model.give(*dims))


@builds("pointwise.scale")
def _scale(model: ProbeModel, dims: Dims) -> bytes:
    return _chain(model, dims, "Mul", model.constant(np.float32(0.9)))


@builds("pointwise.row")
def _add_row(model: ProbeModel, dims: Dims) -> bytes:
    return _chain(model, dims, "Add", model.store(dims[1]))


@builds("pointwise.column")
def _add_column(model: ProbeModel, dims: Dims) -> bytes:
    return _chain(model, dims, "Add", model.store(dims[0], 1))


@builds("pointwise.where")
def _where(model: ProbeModel, dims: Dims) -> bytes:
    keep = model.constant(np.ones(dims, bool))
    value, other = model.give(*dims), model.give(*dims)
    for _ in range(model.copies):
        value = model.add("Where", keep, value, other)
    return model.finish(value)


@builds("pointwise.rotary")
def _rotary(model: ProbeModel, dims: Dims) -> bytes:
    rows, width = dims
    heads = max(width // 64, 1)
    half = width // heads // 2
    positions = model.constant(np.arange(rows, dtype=np.int64)[None])
    tables = [model.store(rows, half) for _ in range(2)]
    return _chain(
        model, (1, rows, heads * half * 2), "RotaryEmbedding", positions, *tables,
        domain=MICROSOFT, num_heads=heads, rotary_embedding_dim=0 if heads == 1 else half * 2,
    )  # fmt: skip


@builds("move.cast")
def _cast(model: ProbeModel, dims: Dims) -> bytes:
    for _ in range(model.copies):
        model.tap(model.add("Cast", model.give(*dims, dtype="int8"), to=1), len(dims))
    return model.finish()


@builds("quantize.linear")
def _quantize(model: ProbeModel, dims: Dims) -> bytes:
    zero = model.constant(np.uint8(128))
    for _ in range(model.copies):
        model.tap(model.add("QuantizeLinear", model.give(*dims), model.scale(), zero), len(dims))
    return model.finish(kind="uint8")


@builds("quantize.dequantize")
def _dequantize(model: ProbeModel, dims: Dims) -> bytes:
    zero = model.constant(np.uint8(128))
    for _ in range(model.copies):
        x = model.give(*dims, dtype="uint8")
        model.tap(model.add("DequantizeLinear", x, model.scale(), zero), len(dims))
    return model.finish()


@builds("quantize.dynamic")
def _quantize_dynamic(model: ProbeModel, dims: Dims) -> bytes:
    for _ in range(model.copies):
        model.tap(model.add("DynamicQuantizeLinear", model.give(*dims), results=3), len(dims))
    return model.finish(kind="uint8")


@builds("quantize.add")
def _quantized_add(model: ProbeModel, dims: Dims) -> bytes:
    zero = model.constant(np.uint8(128))
    other = model.give(*dims, dtype="uint8")
    value = model.give(*dims, dtype="uint8")
    for _ in range(model.copies):
        value = model.add(
            "QLinearAdd", value, model.scale(), zero, other, model.scale(), zero, model.scale(),
            zero, domain=MICROSOFT,
        )  # fmt: skip
    return model.finish(value, kind="uint8")


# ---- operators that move values


@builds("move.transpose")
def _transpose(model: ProbeModel, dims: Dims) -> bytes:
    """Heads and positions change places: rows of ``width`` values stay whole."""
    positions, heads, width = dims
    for _ in range(model.copies):
        x = model.give(1, positions, heads, width)
        model.tap(model.add("Transpose", x, perm=[0, 2, 1, 3]), 4)
    return model.finish()


@builds("move.transpose-last")
def _transpose_last(model: ProbeModel, dims: Dims) -> bytes:
    for _ in range(model.copies):
        model.tap(model.add("Transpose", model.give(1, *dims), perm=[0, 2, 1]), 3)
    return model.finish()


@builds("move.concat")
def _concat(model: ProbeModel, dims: Dims) -> bytes:
    half = (dims[0], max(dims[1] // 2, 1))
    for _ in range(model.copies):
        model.tap(model.add("Concat", model.give(*half), model.give(*half), axis=1), 2)
    return model.finish()


@builds("move.slice")
def _slice(model: ProbeModel, dims: Dims) -> bytes:
    starts, ends = model.constant(np.zeros(1, np.int64)), model.constant(np.array([dims[1]]))
    axes = model.constant(np.array([1]))
    for _ in range(model.copies):
        model.tap(model.add("Slice", model.give(dims[0], 2 * dims[1]), starts, ends, axes), 2)
    return model.finish()


@builds("move.split")
def _split(model: ProbeModel, dims: Dims) -> bytes:
    width = max(dims[1] // 2, 1)
    sizes = model.constant(np.array([width, width]))
    for _ in range(model.copies):
        model.tap(model.add("Split", model.give(dims[0], 2 * width), sizes, results=2, axis=1), 2)
    return model.finish()


@builds("move.expand")
def _expand(model: ProbeModel, dims: Dims) -> bytes:
    shape = model.constant(np.array(dims))
    for _ in range(model.copies):
        model.tap(model.add("Expand", model.give(1, dims[1]), shape), 2)
    return model.finish()


@builds("move.pad")
def _pad(model: ProbeModel, dims: Dims) -> bytes:
    pads = model.constant(np.array([0, 0, 0, 1]))
    for _ in range(model.copies):
        model.tap(model.add("Pad", model.give(*dims), pads), 2)
    return model.finish()


@builds("move.resize")
def _resize(model: ProbeModel, dims: Dims) -> bytes:
    channels, size = dims
    scales = model.constant(np.array([1, 1, 2, 2], np.float32))
    for _ in range(model.copies):
        x = model.give(1, channels, max(size // 2, 1), max(size // 2, 1))
        y = model.add(
            "Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )  # fmt: skip
        model.tap(y, 4)
    return model.finish()


@builds("embedding.fp32")
def _embedding(model: ProbeModel, dims: Dims) -> bytes:
    rows, width = dims
    below = max((1 << 22) // width, 2)
    table = model.store(below, width)
    for _ in range(model.copies):
        model.tap(model.add("Gather", table, model.give_indices(rows, below=below)), 2)
    return model.finish()


@builds("pool.max")
def _max_pool(model: ProbeModel, dims: Dims) -> bytes:
    channels, size, kernel, _ = dims
    pooling = {"kernel_shape": [kernel] * 2, "strides": [1, 1], "pads": _pads(kernel, kernel)}
    return _chain(model, (1, channels, size, size), "MaxPool", **pooling)


@builds("reduce.mean")
def _reduce(model: ProbeModel, dims: Dims) -> bytes:
    axes = model.constant(np.array([1]))
    for _ in range(model.copies):
        model.tap(model.add("ReduceMean", model.give(*dims), axes, keepdims=1), 2)
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
