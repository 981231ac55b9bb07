"""How the models of probes are built: operators on rows and single values, and moves."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mopt.cost_models.probe_models import MICROSOFT, Dims, ProbeModel, builds, same_pads


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


@builds("other.topk")
def _topk(model: ProbeModel, dims: Dims) -> bytes:
    count = model.constant(np.array([min(2, dims[1])]))
    for _ in range(model.copies):
        model.tap(model.add("TopK", model.give(*dims), count, results=2), 2)
    return model.finish()


@builds("pool.max")
def _max_pool(model: ProbeModel, dims: Dims) -> bytes:
    channels, size, kernel, _ = dims
    pooling = {"kernel_shape": [kernel] * 2, "strides": [1, 1], "pads": same_pads(kernel, kernel)}
    return _chain(model, (1, channels, size, size), "MaxPool", **pooling)


@builds("reduce.mean")
def _reduce(model: ProbeModel, dims: Dims) -> bytes:
    axes = model.constant(np.array([1]))
    for _ in range(model.copies):
        model.tap(model.add("ReduceMean", model.give(*dims), axes, keepdims=1), 2)
    return model.finish()
