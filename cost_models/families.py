"""Families of operators that share a kernel: what their sizes mean, and which are worth probing.

The time of an operator is a smooth function of the logarithms of a few sizes, its *features*, once
the family is fixed. Sizes (``dims``) by kind:

- linear: rows, outputs, inputs (and the block of a weight in blocks)
- matmul: batches, rows, columns, inner
- attention: batch, heads, queries, keys, width
- convolution: batch, inputs, outputs, groups, height, width (of the output), kernel height, kernel
  width, stride; plain ones: batch, inputs, outputs, groups, *output sizes, *kernel sizes
- recurrent: steps, batch, inputs, hidden, directions
- pool: channels, size, kernel, stride
- everything else: rows and width, or only values in all
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from mopt.cost_models.convolutions import (
    convolution_amount,
    convolution_features,
    draw_convolution,
    draw_depthwise,
    draw_plain,
    draw_transposed,
)
from mopt.cost_models.family import FLOAT_BYTES, Amount, Dims, Family, log, near, nice, up

# ---- linear


def _linear_amount(
    weight_bytes: float, input_bytes: float, tile_rows: int
) -> Callable[[Dims], Amount]:
    def amount(dims: Dims) -> Amount:
        rows, outputs, inputs = dims[:3]
        blocks = math.ceil(inputs / dims[3]) if len(dims) > 3 else 0
        return Amount(
            # Kernels compute whole tiles.
            2.0 * up(rows, tile_rows) * up(outputs, 16) * inputs,
            weight_bytes * outputs * inputs + FLOAT_BYTES * outputs * blocks,
            input_bytes * rows * inputs,
            FLOAT_BYTES * rows * outputs,
            float(rows * outputs * blocks),
        )

    return amount


def _linear_features(dims: Dims) -> tuple[float, ...]:
    # A single row takes another kernel: a step of two octaves keeps it apart.
    rows = log(dims[0]) if dims[0] > 1 else -2.0
    rest = (log(dims[1]), log(dims[2]), *(log(d) for d in dims[3:]))
    return (rows, *rest)


def _draw_linear(values: tuple[float, ...]) -> Dims:
    rows, outputs, inputs = values[:3]
    # A third of the probes has one row; the others go up by octaves.
    count = 1 if rows < 0 else round(2**rows)
    most = 2**28 / (count * 2.0**outputs * 2.0**inputs)
    if most < 1:  # some milliseconds on a core: larger ones tell no more
        count = max(1, int(count * most))
    sizes = (count, nice(2**outputs), nice(2**inputs))
    return (*sizes, 2 ** round(values[3])) if len(values) > 3 else sizes


_LINEAR_BOX = ((-4.0, 10.5), (5.0, 12.3), (5.0, 12.3))


def _linear(
    name: str, share: float, weight_bytes: float, fmt: str, *, blocks: bool = False,
    codes: int = FLOAT_BYTES, tile: int = 1,
) -> Family:  # fmt: skip
    box = (*_LINEAR_BOX, (4.0, 7.0)) if blocks else _LINEAR_BOX
    amount = _linear_amount(weight_bytes, codes, tile)
    return Family(name, "linear", amount, _linear_features, box, _draw_linear, share, fmt)


# ---- products of activations, attention


def _matmul_amount(dims: Dims) -> Amount:
    batches, rows, columns, inner = dims
    return Amount(
        2.0 * batches * rows * columns * inner,
        FLOAT_BYTES * batches * inner * columns,
        FLOAT_BYTES * batches * rows * inner,
        FLOAT_BYTES * batches * rows * columns,
        batches,
    )


def _draw_matmul(values: tuple[float, ...]) -> Dims:
    batches, rows, columns, inner = (2**v for v in values)
    most = min(1.0, 2**28 / (batches * rows * columns * inner))
    return max(1, round(batches * most)), round(rows), near(columns, 4), near(inner, 8)


def _attention_amount(dims: Dims) -> Amount:
    batch, heads, queries, keys, width = dims
    values = FLOAT_BYTES * batch * heads * width
    scores = batch * heads * queries * keys
    return Amount(
        4.0 * scores * width, values * 2 * keys, values * queries, values * queries, scores
    )


def _attention_features(dims: Dims) -> tuple[float, ...]:
    batch, heads, queries, keys, width = dims
    return log(batch * heads), log(queries), log(keys), log(width)


def _draw_attention(values: tuple[float, ...]) -> Dims:
    batch, heads, queries, keys, width = (2**v for v in values)
    most = min(1.0, 2**27 / (batch * heads * queries * keys * width))
    queries *= most
    return round(batch), max(1, round(heads)), max(1, round(queries)), round(keys), near(width, 8)


def _draw_causal(values: tuple[float, ...]) -> Dims:
    batch, heads, queries, _, width = _draw_attention(values)
    return batch, heads, queries, queries, width


# ---- rows, values


def _rows_amount(flops: float, passes: float) -> Callable[[Dims], Amount]:
    def amount(dims: Dims) -> Amount:
        values = float(math.prod(dims))
        return Amount(
            flops * values, 0.0, FLOAT_BYTES * max(passes - 1, 0) * values, FLOAT_BYTES * values,
            dims[0] if len(dims) > 1 else 0.0,
        )  # fmt: skip

    return amount


def _rows_features(dims: Dims) -> tuple[float, ...]:
    return log(dims[0]), log(math.prod(dims[1:]))


def _values_features(dims: Dims) -> tuple[float, ...]:
    return (log(math.prod(dims)),)


def _draw_rows(values: tuple[float, ...]) -> Dims:
    rows, width = 2 ** values[0], nice(2 ** values[1])
    return max(1, round(min(rows, 2**20.5 / width))), width


def _draw_values(values: tuple[float, ...]) -> Dims:
    count = 2 ** values[0]
    width = min(512, nice(count))
    return max(1, round(count / width)), width


def _values(name: str, kind: str, flops: float, passes: float, share: float = 0.5) -> Family:
    return Family(
        name, kind, _rows_amount(flops, passes), _values_features, ((5.0, 20.5),), _draw_values,
        share,
    )  # fmt: skip


def _rows(name: str, kind: str, flops: float, passes: float, share: float = 1.0) -> Family:
    return Family(
        name, kind, _rows_amount(flops, passes), _rows_features, ((0.0, 11.0), (4.0, 12.0)),
        _draw_rows, share,
    )  # fmt: skip


def _pool_amount(dims: Dims) -> Amount:
    channels, size, kernel, stride = dims
    values = float(channels * size * size)
    return Amount(
        values * kernel**2, 0.0, FLOAT_BYTES * values * stride**2, FLOAT_BYTES * values, channels
    )


def _draw_pool(values: tuple[float, ...]) -> Dims:
    channels, size = near(2 ** values[0], 16), round(2 ** values[1])
    return channels, size, (2, 3)[int(values[2])], 1


def _resize_amount(dims: Dims) -> Amount:
    channels, size = dims
    values = float(channels * size**2)
    return Amount(0.0, 0.0, values, FLOAT_BYTES * values)


def _recurrent_amount(gates: int) -> Callable[[Dims], Amount]:
    def amount(dims: Dims) -> Amount:
        steps, batch, inputs, hidden, directions = dims
        weights = float(directions * gates * hidden * (inputs + hidden))
        # The recurrent weights are read again in every step.
        again = directions * gates * hidden * hidden * (steps - 1)
        return Amount(
            2 * steps * batch * weights,
            FLOAT_BYTES * (weights + again),
            FLOAT_BYTES * steps * batch * inputs,
            FLOAT_BYTES * steps * batch * directions * hidden,
            steps * directions,
        )

    return amount


def _draw_recurrent(values: tuple[float, ...]) -> Dims:
    steps, batch, inputs, hidden, directions = (2**v for v in values)
    return round(steps), round(batch), nice(inputs), nice(hidden), 2 if directions > 1.4 else 1


def _logs(dims: Dims) -> tuple[float, ...]:
    return tuple(log(d) for d in dims)


def _recurrent(name: str, gates: int, share: float) -> Family:
    box = ((2.0, 6.0), (0.0, 4.0), (5.0, 9.0), (5.0, 9.0), (0.0, 1.0))
    return Family(name, "recurrent", _recurrent_amount(gates), _logs, box, _draw_recurrent, share)


_CONV_BOX = ((2.0, 9.3), (4.0, 9.3), (1.5, 7.0), (0.0, 3.99), (0.0, 1.0))
_FAMILIES = (
    _linear("linear.fp32", 8, 4, "fp32"),
    _linear("linear.fp32-bare", 5, 4, "fp32"),
    _linear("linear.int8-dynamic", 7, 1, "int8-dynamic", tile=16),
    _linear("linear.int8-shared", 4, 1, "int8-dynamic", codes=1, tile=16),
    _linear("linear.int8-static", 3, 1, "int8-qdq", codes=1, tile=16),
    _linear("linear.int4-blocks", 7, 0.5, "int4-g32", blocks=True),
    _linear("linear.int8-blocks", 5, 1, "int8-g128", blocks=True),
    _linear("linear.int2-blocks", 2, 0.25, "int2-g32", blocks=True),
    _linear("linear.int4-float", 2, 0.5, "int4-g32-afloat", blocks=True),
    Family(
        "matmul.fp32", "matmul", _matmul_amount, _logs,
        ((0.0, 6.0), (0.0, 9.0), (3.0, 9.0), (4.0, 9.0)), _draw_matmul, 4,
    ),
    Family(
        "attention.full", "attention", _attention_amount, _attention_features,
        ((0.0, 2.0), (0.0, 4.0), (0.0, 9.5), (3.0, 9.5), (4.0, 7.0)), _draw_attention, 5,
    ),
    Family(
        "attention.causal", "attention", _attention_amount, _attention_features,
        ((0.0, 2.0), (0.0, 4.0), (2.0, 9.5), (3.0, 9.5), (4.0, 7.0)), _draw_causal, 4,
    ),
    Family(
        "convolution.fp32", "convolution", convolution_amount(4, 4, 16), convolution_features,
        _CONV_BOX, draw_convolution, 9,
    ),
    Family(
        "convolution.depthwise", "convolution", convolution_amount(4, 4), convolution_features,
        ((4.0, 10.0), (2.0, 7.0), (0.0, 3.99), (0.0, 1.0)), draw_depthwise, 3,
    ),
    Family(
        "convolution.int8", "convolution", convolution_amount(1, 1, 16), convolution_features,
        _CONV_BOX, draw_convolution, 7, "int8-qdq",
    ),
    Family(
        "convolution.int8-depthwise", "convolution", convolution_amount(1, 1),
        convolution_features, ((4.0, 10.0), (2.0, 7.0), (0.0, 3.99), (0.0, 1.0)),
        draw_depthwise, 2, "int8-qdq",
    ),
    Family(
        "convolution.plain", "convolution", convolution_amount(4, 4), convolution_features,
        ((3.0, 8.0), (3.0, 8.0), (2.0, 5.0), (0.0, 2.99), (0.0, 1.0)), draw_plain, 2,
    ),
    Family(
        "convolution.transposed", "convolution", convolution_amount(4, 4), convolution_features,
        ((3.0, 8.0), (3.0, 8.0), (2.0, 6.0)), draw_transposed, 1.5,
    ),
    _recurrent("recurrent.lstm", 4, 2),
    _recurrent("recurrent.gru", 3, 1),
    _rows("embedding.fp32", "embedding", 0, 2),
    _rows("norm.layer", "norm", 8, 2, 1.5),
    _rows("norm.rms", "norm", 5, 2, 1),
    _rows("norm.skip", "norm", 9, 3, 1.5),
    _rows("norm.batch", "norm", 2, 2, 0.7),
    _rows("softmax.last", "softmax", 10, 2, 1),
    _rows("pointwise.row", "pointwise", 1, 2, 0.7),
    _rows("pointwise.column", "pointwise", 1, 2, 0.7),
    _rows("pointwise.rotary", "pointwise", 3, 2, 0.7),
    _rows("reduce.mean", "reduce", 1, 1, 0.7),
    _rows("other.topk", "other", 8, 2, 0.5),
    _rows("move.transpose-last", "move", 0, 2, 0.8),
    _rows("move.concat", "move", 0, 2, 0.7),
    _rows("move.slice", "move", 0, 2, 0.7),
    _rows("move.split", "move", 0, 2, 0.7),
    _rows("move.expand", "move", 0, 1, 0.5),
    _rows("move.pad", "move", 0, 2, 0.5),
    *(_values(f"pointwise.{name}", "pointwise", flops, 2) for name, flops in (
        ("relu", 1), ("sigmoid", 20), ("tanh", 20), ("erf", 20), ("gelu", 25), ("silu", 22),
        ("sqrt", 4), ("hardsigmoid", 3), ("floor", 1), ("scale", 1),
    )),
    _values("pointwise.add", "pointwise", 1, 3, 0.7),
    _values("pointwise.where", "pointwise", 1, 3),
    _values("move.cast", "move", 1, 1.25),
    _values("quantize.linear", "quantize", 3, 1.25),
    _values("quantize.dequantize", "quantize", 2, 1.25),
    _values("quantize.dynamic", "quantize", 5, 2.25),
    _values("quantize.add", "quantize", 6, 0.75),
    Family(
        "move.transpose", "move", _rows_amount(0, 2), _logs,
        ((3.0, 9.0), (0.0, 4.0), (4.0, 7.0)),
        lambda v: (round(2 ** v[0]), max(1, round(2 ** v[1])), nice(2 ** v[2])), 1,
    ),
    Family(
        "move.resize", "move", _resize_amount, _logs, ((3.0, 8.0), (2.0, 6.5)),
        lambda v: (nice(2 ** v[0]), near(2 ** v[1], 2)), 0.6,
    ),
    Family(
        "pool.max", "pool", _pool_amount, _logs,
        ((4.0, 8.0), (2.0, 6.0), (0.0, 1.99)), _draw_pool, 0.8,
    ),
)  # fmt: skip


@cache
def families() -> dict[str, Family]:
    """Every family by name."""
    return {family.name: family for family in _FAMILIES}
