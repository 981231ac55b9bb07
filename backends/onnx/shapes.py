"""Shape rules of the operators that decide sizes, for bounding what constant folding makes.

ONNX's own inference is not used on strangers' models: following contents of vectors one by one, it
takes gigabytes for a ``Range`` or a chain of ``Concat``. A rule gives the first output; sizes it
cannot tell are None. Rules hold for constants and for other values alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mopt.backends.onnx.values import (
    MOST_CONTENTS,
    VARIES,
    WIDEST,
    Size,
    Sizes,
    Value,
    broadcast,
    checked_sizes,
    computed,
    count,
    integer_attribute,
    integers_attribute,
    value_of_tensor,
)
from mopt.backends.onnx.wire import ELEMENT_BITS

if TYPE_CHECKING:
    import onnx

Inputs = Sequence[Value]
Rule = Callable[["onnx.NodeProto", Inputs], Value]

_RULES: dict[tuple[str, str], Rule] = {}
_MICROSOFT = "com.microsoft"


def first_output(node: onnx.NodeProto, inputs: Inputs) -> Value:
    """The first output of an operator; an input that is left out has no shape.

    ``is_constant`` is not set here. Where all inputs are constants, ``elements`` is a bound, or
    None if there is none.
    """
    rule = _RULES.get((node.domain, node.op_type))
    if rule is None or not inputs:
        return Value()
    result = rule(node, inputs)
    exact = count(result.shape)
    if exact is None or exact == result.elements:
        return result
    return replace(result, elements=exact)


def _rule(names: str, domain: str = "") -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update({(domain, name): function for name in names.split()})
        return function

    return register


@_rule(
    """Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization BitwiseNot Ceil Celu Clip Cos Cosh
    CumSum Dropout Elu Erf Exp Floor Gelu GroupNormalization HardSigmoid HardSwish
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Log LogSoftmax Mish Neg Not
    RMSNormalization Reciprocal Relu Round ScatterElements ScatterND Selu Sigmoid Sign Sin Sinh
    Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Trilu"""
)
@_rule(
    """BiasGelu FastGelu QuickGelu RotaryEmbedding SkipLayerNormalization
    SkipSimplifiedLayerNormalization""",
    _MICROSOFT,
)
def _same(node: onnx.NodeProto, inputs: Inputs) -> Value:
    return replace(inputs[0], contents=None)


@_rule("Cast CastLike DequantizeLinear DynamicQuantizeLinear Identity QuantizeLinear")
@_rule("DequantizeLinear QuantizeLinear", _MICROSOFT)
def _converted(node: onnx.NodeProto, inputs: Inputs) -> Value:
    kept = inputs[0].contents if node.op_type in ("Cast", "CastLike", "Identity") else None
    bits = ELEMENT_BITS.get(integer_attribute(node, "to", 0)) if node.op_type == "Cast" else None
    return replace(inputs[0], contents=kept, width=-(-bits // 8) if bits else WIDEST)


@_rule(
    """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less
    LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"""
)
def _elementwise(node: onnx.NodeProto, inputs: Inputs) -> Value:
    shape = broadcast([value.shape for value in inputs])
    bounds = [max(value.elements, 1) for value in inputs if value.elements is not None]
    elements = math.prod(bounds) if len(bounds) == len(inputs) else None
    return Value(
        shape, computed(node.op_type, [value.contents for value in inputs]), elements=elements,
        width=max(value.width for value in inputs),
    )  # fmt: skip


@_rule("Shape")
def _shape(node: onnx.NodeProto, inputs: Inputs) -> Value:
    sizes = inputs[0].shape
    if sizes is None:
        return Value((None,), elements=MOST_CONTENTS)
    start = integer_attribute(node, "start", 0)
    sizes = sizes[start : integer_attribute(node, "end", len(sizes))]
    return Value((len(sizes),), sizes)


@_rule("Size")
def _size(node: onnx.NodeProto, inputs: Inputs) -> Value:
    return Value((), (count(inputs[0].shape),))


@_rule("Transpose")
def _transpose(node: onnx.NodeProto, inputs: Inputs) -> Value:
    shape = inputs[0].shape
    if shape is not None:
        order = integers_attribute(node, "perm") or tuple(range(len(shape)))[::-1]
        is_order = sorted(order) == list(range(len(shape)))
        shape = tuple(shape[axis] for axis in order) if is_order else None
    return replace(inputs[0], shape=shape, contents=None)


@_rule("Reshape")
def _reshape(node: onnx.NodeProto, inputs: Inputs) -> Value:
    data, target = inputs[0], inputs[1] if len(inputs) > 1 else Value()
    return replace(data, shape=_reshaped(node, data.shape, target))


def _reshaped(node: onnx.NodeProto, sizes: Sizes | None, target: Value) -> Sizes | None:
    if target.contents is None:
        length = count(target.shape)
        return (None,) * length if length is not None and length <= MOST_CONTENTS else None
    found = list(target.contents)
    copied = []
    for i, size in enumerate(found):
        if size == 0 and not integer_attribute(node, "allowzero", 0):
            found[i] = sizes[i] if sizes is not None and i < len(sizes) else None
            copied.append(i)
    if -1 in found:
        rest = [n for i, n in enumerate(sizes) if i not in copied] if sizes is not None else [None]
        others = [n for i, n in enumerate(found) if i not in copied and n != -1]
        found[found.index(-1)] = _left_over(rest, others)
    return checked_sizes(found)


def _left_over(sizes: Sequence[Size], others: Sequence[Size]) -> Size:
    """What -1 stands for: nobody can tell while a size that is left over varies."""
    numbers = [n for n in sizes if isinstance(n, int)]
    known = [n for n in others if isinstance(n, int)]
    if None in sizes or len(known) < len(others):
        return None
    if len(numbers) < len(sizes):
        return VARIES
    return math.prod(numbers) // max(math.prod(known), 1)


@_rule("Squeeze Unsqueeze")
def _squeeze(node: onnx.NodeProto, inputs: Inputs) -> Value:
    data = inputs[0]
    axes = inputs[1].integers if len(inputs) > 1 else integers_attribute(node, "axes")
    shape: Sizes | None = None
    if data.shape is not None and axes is not None:
        sizes = list(data.shape)
        if node.op_type == "Unsqueeze":
            rank = len(sizes) + len(axes)
            for axis in sorted(axis % rank for axis in axes):
                sizes.insert(axis, 1)
        else:
            gone = {axis % max(len(sizes), 1) for axis in axes}
            sizes = [size for i, size in enumerate(sizes) if i not in gone]
        shape = tuple(sizes)
    return replace(data, shape=shape)


@_rule("Flatten")
def _flatten(node: onnx.NodeProto, inputs: Inputs) -> Value:
    return replace(inputs[0], shape=(None, None), contents=None)


@_rule("Concat")
def _concat(node: onnx.NodeProto, inputs: Inputs) -> Value:
    width = max(value.width for value in inputs)
    bounds = [value.elements for value in inputs if value.elements is not None]
    elements = sum(bounds) if len(bounds) == len(inputs) else None
    contents: Sizes | None = None
    if all(value.contents is not None for value in inputs):
        joined = tuple(n for value in inputs for n in value.contents or ())
        contents = joined if len(joined) <= MOST_CONTENTS else None
    axis = integer_attribute(node, "axis", 0)
    shapes = [value.shape for value in inputs if value.shape is not None]
    ranks = {len(shape) for shape in shapes}
    if len(shapes) < len(inputs) or len(ranks) > 1 or not -min(ranks) <= axis < min(ranks):
        return Value(None, contents, elements=elements, width=width)
    sizes = list(shapes[0])
    sizes[axis] = _sum([shape[axis] for shape in shapes])
    return Value(tuple(sizes), contents, elements=elements, width=width)


def _sum(sizes: Sequence[Size]) -> Size:
    numbers = [n for n in sizes if isinstance(n, int)]
    if len(numbers) == len(sizes):
        return sum(numbers)
    return None if None in sizes else VARIES


@_rule("Slice")
def _slice(node: onnx.NodeProto, inputs: Inputs) -> Value:
    data, padded = inputs[0], [*inputs[1:], *[Value()] * 4]
    starts, stops = (value.contents for value in padded[:2])
    axes, steps = (value.integers for value in padded[2:4])
    is_given = [value.shape is not None or value.contents is not None for value in padded[2:4]]
    whole = replace(data, shape=None, contents=None)
    if data.shape is None or starts is None or stops is None or len(starts) != len(stops):
        return whole
    if (axes is None and is_given[0]) or (steps is None and is_given[1]):
        return whole
    axes = axes if axes is not None else tuple(range(len(starts)))
    steps = steps if steps is not None else (1,) * len(starts)
    rank = len(data.shape)
    in_range = all(-rank <= axis < rank for axis in axes)
    if {len(axes), len(steps)} != {len(starts)} or 0 in steps or not in_range:
        return whole
    sizes, contents = list(data.shape), data.contents if rank == 1 else None
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        if isinstance(start, int) and isinstance(stop, int):
            size = sizes[axis]
            if isinstance(size, int):
                sizes[axis] = len(range(size)[start:stop:step])
            contents = contents[start:stop:step] if contents is not None else None
        else:
            sizes[axis], contents = (None if None in (start, stop) else VARIES), None
    return replace(data, shape=tuple(sizes), contents=contents)


@_rule("Split")
def _split(node: onnx.NodeProto, inputs: Inputs) -> Value:
    shape, axis = inputs[0].shape, integer_attribute(node, "axis", 0)
    if shape is not None and -len(shape) <= axis < len(shape):
        sizes = list(shape)
        sizes[axis] = None
        shape = tuple(sizes)
    return replace(inputs[0], shape=shape, contents=None)


@_rule("Gather")
def _gather(node: onnx.NodeProto, inputs: Inputs) -> Value:
    if len(inputs) < 2:
        return Value()
    data, index = inputs[:2]
    axis = integer_attribute(node, "axis", 0)
    bounded = data.elements is not None and index.elements is not None
    elements = (data.elements or 0) * (index.elements or 0) if bounded else None
    contents: Sizes | None = None
    if data.contents is not None and index.integers is not None and axis in (0, -1):
        size = len(data.contents)
        if all(-size <= i < size for i in index.integers):
            contents = tuple(data.contents[i] for i in index.integers)
    shape: Sizes | None = None
    if data.shape and index.shape is not None and -len(data.shape) <= axis < len(data.shape):
        axis %= len(data.shape)
        shape = (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])
    return Value(shape, contents, elements=elements, width=data.width)


@_rule("GatherElements")
def _gather_elements(node: onnx.NodeProto, inputs: Inputs) -> Value:
    return replace(inputs[-1], contents=None, width=inputs[0].width)


@_rule("Expand")
def _expand(node: onnx.NodeProto, inputs: Inputs) -> Value:
    target = inputs[1].contents if len(inputs) > 1 else None
    sizes = checked_sizes(target) if target is not None else None
    return Value(broadcast([inputs[0].shape, sizes]), width=inputs[0].width)


@_rule("Tile")
def _tile(node: onnx.NodeProto, inputs: Inputs) -> Value:
    repeats = inputs[1].integers if len(inputs) > 1 else None
    if repeats is None or inputs[0].elements is None:
        return Value()
    times = math.prod(n for n in checked_sizes(repeats) if isinstance(n, int))
    return Value(elements=inputs[0].elements * times, width=inputs[0].width)


@_rule("ConstantOfShape")
def _constant_of_shape(node: onnx.NodeProto, inputs: Inputs) -> Value:
    if inputs[0].contents is None:
        return Value()
    shape = checked_sizes(inputs[0].contents)
    filled = next((a.t for a in node.attribute if a.name == "value"), None)
    found = value_of_tensor(filled).contents if filled is not None else None
    elements = count(shape)
    is_small = elements is not None and elements <= MOST_CONTENTS
    return Value(shape, (found or (0,))[:1] * (elements or 0) if is_small else None)


@_rule("Range")
def _range(node: onnx.NodeProto, inputs: Inputs) -> Value:
    bounds = [value.integers for value in inputs]
    if len(bounds) != 3 or not all(bounds):
        return Value((None,))
    start, stop, step = (found[0] for found in bounds if found)
    length = max(0, -((start - stop) // step)) if step else 0
    numbers = tuple(range(start, stop, step)) if 0 < length <= MOST_CONTENTS else None
    return Value((length,), numbers)


@_rule("NonZero")
def _non_zero(node: onnx.NodeProto, inputs: Inputs) -> Value:
    shape = inputs[0].shape
    rank = len(shape) if shape is not None else None
    bound = inputs[0].elements
    return Value((rank, VARIES), elements=None if bound is None else bound * MOST_CONTENTS)


@_rule(
    """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare ArgMax ArgMin Compress TopK"""
)
def _not_larger(node: onnx.NodeProto, inputs: Inputs) -> Value:
    return Value(elements=inputs[0].elements)


@_rule("MatMul MatMulInteger")
@_rule("DynamicQuantizeMatMul MatMulIntegerToFloat", _MICROSOFT)
def _matmul(node: onnx.NodeProto, inputs: Inputs) -> Value:
    left, right = inputs[0], inputs[1] if len(inputs) > 1 else Value()
    bounded = left.elements is not None and right.elements is not None
    elements = (left.elements or 0) * (right.elements or 0) if bounded else None
    if not left.shape or not right.shape or min(len(left.shape), len(right.shape)) < 2:
        return Value(elements=elements)
    batch = broadcast([left.shape[:-2], right.shape[:-2]])
    return Value((*(batch or ()), left.shape[-2], right.shape[-1]), elements=elements)


@_rule("MatMulNBits", _MICROSOFT)
def _matmul_packed(node: onnx.NodeProto, inputs: Inputs) -> Value:
    if not inputs[0].shape:
        return Value()
    return Value((*inputs[0].shape[:-1], integer_attribute(node, "N", 0)))


@_rule("Gemm")
def _gemm(node: onnx.NodeProto, inputs: Inputs) -> Value:
    if len(inputs) < 2 or any(value.shape is None or len(value.shape) != 2 for value in inputs[:2]):
        return Value()
    left, right = (value.shape or () for value in inputs[:2])
    rows = left[1 if integer_attribute(node, "transA", 0) else 0]
    columns = right[0 if integer_attribute(node, "transB", 0) else 1]
    return Value((rows, columns))


@_rule("Attention")
@_rule("Attention GroupQueryAttention MultiHeadAttention", _MICROSOFT)
def _attention(node: onnx.NodeProto, inputs: Inputs) -> Value:
    shape = inputs[0].shape
    return Value((*shape[:-1], None)) if shape and len(shape) in (3, 4) else Value()


@_rule(
    """AveragePool Conv ConvInteger ConvTranspose GlobalAveragePool GlobalMaxPool LpPool MaxPool Pad
    QLinearConv Resize"""
)
def _batch_first(node: onnx.NodeProto, inputs: Inputs) -> Value:
    """The batch stays as it is if it varies; the rest depends on attributes not looked at."""
    shape = inputs[0].shape
    if not shape:
        return Value()
    # The sizes that Resize may be given replace all sizes of the input.
    varies = shape[0] == VARIES and not (node.op_type == "Resize" and len(inputs) > 3)
    return Value((VARIES if varies else None, *[None] * (len(shape) - 1)))
