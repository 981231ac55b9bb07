"""Which family an executed operator belongs to, and what its sizes are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from mopt.cost_models.executed import ExecutedNode, Shape
from mopt.cost_models.family import Dims


@dataclass(frozen=True)
class Operation:
    """An operator as the cost model sees it.

    ``family`` is "" for one that only renames or reads sizes, and None for one that is in no
    family: it is then estimated by its bytes.
    """

    family: str | None
    dims: Dims = ()


FREE = Operation("")
UNKNOWN = Operation(None)
Rule = Callable[[ExecutedNode], Operation]


def operation_of(node: ExecutedNode) -> Operation:
    """The family and sizes of an operator; UNKNOWN where there is no rule for it."""
    if not node.outputs or not node.outputs[0].count:
        return FREE
    rule = _RULES.get(node.operator)
    if rule is not None:
        return rule(node)
    if node.operator in _FREE:
        return FREE
    if node.operator in _VALUES:
        return Operation(_VALUES[node.operator], (node.outputs[0].count,))
    if node.operator in _BINARY:
        return _binary(node)
    return UNKNOWN


def _rows(shape: Shape) -> int:
    return prod(shape[:-1])


def _attribute(node: ExecutedNode, name: str, default: int = 0) -> int:
    return int(node.attributes.get(name, default))


# ---- products


def _product(node: ExecutedNode) -> Operation:
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None and right is not None
    output = node.outputs[0].shape
    inner = left.shape[-2 if _attribute(node, "transA") and len(left.shape) > 1 else -1]
    if right.weight and len(right.shape) == 2:
        columns = output[-1] if len(output) else 1
        # A bias is written into the result first, which the product then adds to.
        has_bias = node.operator == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None
        family = "linear.fp32" if has_bias else "linear.fp32-bare"
        return Operation(family, (prod(output) // columns, columns, inner))
    if len(right.shape) <= 2:
        columns = output[-1] if output else 1
        return Operation("matmul.fp32", (1, prod(output) // columns, columns, inner))
    *batches, rows, columns = output if len(output) > 1 else (1, *output)
    return Operation("matmul.fp32", (prod(batches), rows, columns, inner))


def _linear(family: str, weight: int) -> Rule:
    def rule(node: ExecutedNode) -> Operation:
        stored = node.inputs[weight]
        output = node.outputs[0].shape
        if stored is None or len(stored.shape) != 2:
            return UNKNOWN
        inputs = stored.count // output[-1]
        return Operation(family, (_rows(output), output[-1], inputs))

    return rule


def _blocks(node: ExecutedNode) -> Operation:
    bits = _attribute(node, "bits", 4)
    is_float = bits == 4 and _attribute(node, "accuracy_level") != 4
    sizes = (_attribute(node, "N"), _attribute(node, "K"), _attribute(node, "block_size", 32))
    family = "linear.int4-float" if is_float else f"linear.int{bits}-blocks"
    return Operation(family, (_rows(node.outputs[0].shape), *sizes))


def _attention(family: str) -> Rule:
    def rule(node: ExecutedNode) -> Operation:
        query = node.size(0)
        key = node.inputs[1]
        heads = _attribute(node, "q_num_heads") or _attribute(node, "num_heads")
        if len(query) == 4:
            batch, heads, rows, width = query
        elif heads and len(query) == 3:
            batch, rows, width = query
            width = (width if key is not None else node.outputs[0].shape[-1]) // heads
        else:
            return UNKNOWN
        past = node.inputs[3] if family == "attention.causal" and len(node.inputs) > 3 else None
        keys = key.shape[-2] if key is not None else rows
        if past is not None and len(past.shape) == 4 and rows == 1:
            return Operation("attention.full", (batch, heads, rows, keys + past.shape[-2], width))
        return Operation(family, (batch, heads, rows, keys, width))

    return rule


# ---- convolutions


def _convolution(node: ExecutedNode) -> Operation:
    output, read = node.outputs[0].shape, node.size(0)
    weight = node.inputs[1]
    if weight is None or len(output) < 3:
        return UNKNOWN
    groups = _attribute(node, "group", 1)
    batch, outputs, *places = output
    if "nchwc" not in node.domain:
        return Operation(
            "convolution.plain", (batch, read[1], outputs, groups, *places, *weight.shape[2:])
        )
    return _blocked(
        node, "convolution.fp32", "convolution.depthwise", read[1], output, weight.shape
    )


def _blocked(
    node: ExecutedNode, dense: str, depthwise: str, inputs: int, output: Shape, weight: Shape
) -> Operation:
    groups = _attribute(node, "group", 1)
    batch, outputs, height, width = output
    stride = int(node.attributes.get("strides", [1])[0])
    is_depthwise = groups > 1 and groups >= inputs
    sizes = (batch, inputs, outputs, groups, height, width, *weight[2:], stride)
    return Operation(depthwise if is_depthwise else dense, sizes)


def _quantized_convolution(node: ExecutedNode) -> Operation:
    output, weight = node.outputs[0].shape, node.inputs[3]
    if weight is None or len(output) != 4:
        return UNKNOWN
    inputs = node.size(0)[1]
    if _attribute(node, "channels_last"):
        inputs = node.size(0)[-1]
        output = (output[0], output[3], output[1], output[2])
    names = ("convolution.int8", "convolution.int8-depthwise")
    return _blocked(node, *names, inputs, output, weight.shape)


def _transposed(node: ExecutedNode) -> Operation:
    output, weight = node.outputs[0].shape, node.inputs[1]
    if weight is None:
        return UNKNOWN
    if len(output) != 4:
        return Operation(
            "convolution.plain",
            (output[0], node.size(0)[1], output[1], 1, *node.size(0)[2:], *weight.shape[2:]),
        )
    stride = int(node.attributes.get("strides", [1])[0])
    batch, outputs, height, width = output
    sizes = (batch, node.size(0)[1], outputs, 1, height, width, *weight.shape[2:], stride)
    return Operation("convolution.transposed", sizes)


# ---- rows and values


def _norm(family: str) -> Rule:
    def rule(node: ExecutedNode) -> Operation:
        shape = node.outputs[0].shape
        axis = _attribute(node, "axis", -1) % max(len(shape), 1)
        return Operation(family, (prod(shape[:axis]), prod(shape[axis:])))

    return rule


def _channels(family: str) -> Rule:
    def rule(node: ExecutedNode) -> Operation:
        shape = node.outputs[0].shape
        return Operation(family, (prod(shape[:2]), prod(shape[2:])))

    return rule


def _last_axis(family: str) -> Rule:
    def rule(node: ExecutedNode) -> Operation:
        shape = node.outputs[0].shape or (1,)
        return Operation(family, (_rows(shape), shape[-1]))

    return rule


def _binary(node: ExecutedNode) -> Operation:
    output = node.outputs[0]
    shapes = [value.shape for value in node.inputs if value is not None]
    small = min(shapes, key=prod)
    if prod(small) == output.count:
        return Operation("pointwise.add", (output.count,))
    if prod(small) == 1:
        return Operation("pointwise.scale", (output.count,))
    width = 1
    for size, whole in zip(reversed(small), reversed(output.shape), strict=False):
        if size != whole:
            break
        width *= size
    if width > 1:
        return Operation("pointwise.row", (output.count // width, width))
    run = 1
    for size, whole in zip(reversed(small), reversed(output.shape), strict=False):
        if size != 1:
            break
        run *= whole
    return Operation("pointwise.column", (output.count // run, run))


def _reduce(node: ExecutedNode) -> Operation:
    read, rows = node.inputs[0], node.outputs[0].count
    assert read is not None
    return Operation("reduce.mean", (rows, max(read.count // rows, 1)))


def _pool(node: ExecutedNode) -> Operation:
    shape = node.outputs[0].shape
    kernel = node.attributes.get("kernel_shape", [1])
    stride = node.attributes.get("strides", [1])
    size = max(round(prod(shape[2:]) ** 0.5), 1)
    return Operation("pool.max", (prod(shape[:2]), size, int(kernel[0]), int(stride[0])))


# ---- moves


def _transpose(node: ExecutedNode) -> Operation:
    read = node.size(0)
    order = list(node.attributes.get("perm", range(len(read))[::-1]))
    kept = [axis for axis in order if read[axis] > 1]
    if kept == sorted(kept):
        return FREE
    if order[-1] == len(read) - 1:
        moved = [axis for at, axis in enumerate(order[:-1]) if axis != at]
        heads = read[moved[0]] if moved else 1
        return Operation("move.transpose", (prod(read) // heads // read[-1], heads, read[-1]))
    return Operation("move.transpose-last", (_rows(read), read[-1]))


def _gather(node: ExecutedNode) -> Operation:
    table = node.inputs[0]
    assert table is not None
    count = node.outputs[0].count
    axis = _attribute(node, "axis")
    width = max(prod(table.shape[axis % max(len(table.shape), 1) + 1 :]), 1)
    rows = max(count // width, 1)
    # Rows of codes are shorter; the family is in values of four bytes.
    return Operation("embedding.fp32", (rows, max(round(width * table.bytes / table.count / 4), 1)))


def _gather_rows(node: ExecutedNode) -> Operation:
    shape = node.outputs[0].shape or (1,)
    return Operation("embedding.fp32", (_rows(shape), shape[-1]))


def _scatter(node: ExecutedNode) -> Operation:
    # The whole is copied, then some of it is written.
    return Operation("move.cast", (node.outputs[0].count,))


def _topk(node: ExecutedNode) -> Operation:
    shape = node.size(0)
    return Operation("other.topk", (_rows(shape), shape[-1]))


def _resize(node: ExecutedNode) -> Operation:
    shape = node.outputs[0].shape
    if len(shape) < 3:
        return UNKNOWN
    return Operation("move.resize", (prod(shape[:2]), max(round(prod(shape[2:]) ** 0.5), 1)))


def _split(node: ExecutedNode) -> Operation:
    shape = node.size(0)
    axis = _attribute(node, "axis") % max(len(shape), 1)
    return Operation("move.split", (max(prod(shape[:axis]), 1), prod(shape[axis:])))


def _concat(node: ExecutedNode) -> Operation:
    shape = node.outputs[0].shape or (1,)
    axis = _attribute(node, "axis") % len(shape)
    return Operation("move.concat", (max(prod(shape[:axis]), 1), prod(shape[axis:])))


def _recurrent(family: str) -> Rule:
    def rule(node: ExecutedNode) -> Operation:
        steps, batch, inputs = node.size(0)
        hidden = _attribute(node, "hidden_size")
        directions = 2 if node.attributes.get("direction") == b"bidirectional" else 1
        return Operation(family, (steps, batch, inputs, hidden, directions))

    return rule


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "FusedGemm"), _product),
    "DynamicQuantizeMatMul": _linear("linear.int8-dynamic", 1),
    "MatMulIntegerToFloat": _linear("linear.int8-shared", 1),
    "MatMulInteger": _linear("linear.int8-shared", 1),
    "QGemm": _linear("linear.int8-static", 3),
    "QLinearMatMul": _linear("linear.int8-static", 3),
    "MatMulNBits": _blocks,
    "Attention": _attention("attention.full"),
    "MultiHeadAttention": _attention("attention.full"),
    "GroupQueryAttention": _attention("attention.causal"),
    "Conv": _convolution,
    "FusedConv": _convolution,
    "QLinearConv": _quantized_convolution,
    "ConvTranspose": _transposed,
    "LayerNormalization": _norm("norm.layer"),
    "SkipLayerNormalization": _norm("norm.skip"),
    "SkipSimplifiedLayerNormalization": _norm("norm.skip"),
    "RMSNormalization": _norm("norm.rms"),
    "SimplifiedLayerNormalization": _norm("norm.rms"),
    "BatchNormalization": _channels("norm.batch"),
    "InstanceNormalization": _channels("norm.layer"),
    "GroupNormalization": _channels("norm.layer"),
    "Softmax": _last_axis("softmax.last"),
    "LogSoftmax": _last_axis("softmax.last"),
    "RotaryEmbedding": _last_axis("pointwise.rotary"),
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ArgMax", "ArgMin",
         "GlobalAveragePool", "GlobalMaxPool", "QLinearGlobalAveragePool"), _reduce,
    ),
    **dict.fromkeys(("MaxPool", "AveragePool", "QLinearAveragePool"), _pool),
    "Transpose": _transpose,
    "ReorderInput": _channels("move.transpose-last"),
    "ReorderOutput": _channels("move.transpose-last"),
    **dict.fromkeys(("Concat", "QLinearConcat"), _concat),
    "Slice": _last_axis("move.slice"),
    "Split": _split,
    **dict.fromkeys(("Expand", "Tile"), _last_axis("move.expand")),
    "Pad": _last_axis("move.pad"),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Gather": _gather,
    **dict.fromkeys(("GatherND", "GatherElements"), _gather_rows),
    **dict.fromkeys(("ScatterND", "ScatterElements"), _scatter),
    "TopK": _topk,
    "LSTM": _recurrent("recurrent.lstm"),
    "GRU": _recurrent("recurrent.gru"),
}  # fmt: skip

# Sizes are read, names change: nothing is computed and nothing moves.
_FREE = frozenset({
    "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant",
    "ConstantOfShape", "If", "Loop", "Scan", "OptionalHasElement",
})  # fmt: skip

_VALUES = {
    **dict.fromkeys(
        ("Relu", "LeakyRelu", "PRelu", "Clip", "Neg", "Abs", "Sign", "Not", "Reciprocal",
         "ThresholdedRelu", "IsNaN"), "pointwise.relu",
    ),
    **dict.fromkeys(("Floor", "Ceil", "Round"), "pointwise.floor"),
    "Sqrt": "pointwise.sqrt",
    **dict.fromkeys(("Sigmoid", "Exp", "Log", "Softplus", "Elu", "Selu", "Celu", "Mish"),
                    "pointwise.sigmoid"),
    **dict.fromkeys(("Tanh", "Sin", "Cos"), "pointwise.tanh"),
    "Erf": "pointwise.erf",
    **dict.fromkeys(("Gelu", "FastGelu", "BiasGelu"), "pointwise.gelu"),
    **dict.fromkeys(("QuickGelu", "Swish"), "pointwise.silu"),
    **dict.fromkeys(("HardSigmoid", "HardSwish"), "pointwise.hardsigmoid"),
    "Where": "pointwise.where",
    "Cast": "move.cast",
    "QuantizeLinear": "quantize.linear",
    "DequantizeLinear": "quantize.dequantize",
    "DynamicQuantizeLinear": "quantize.dynamic",
    **dict.fromkeys(("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu",
                     "QLinearSoftmax", "QLinearWhere"), "quantize.add"),
}  # fmt: skip

_BINARY = frozenset({
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Pow", "Mod", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor",
})  # fmt: skip
