"""What is known about a value of an ONNX graph before it runs: its sizes, and small contents.

A size is a number, ``VARIES`` if it certainly changes with the inputs, or None if nothing is known.
The difference matters: a runtime may turn into a constant what is None here, never what varies.
Contents are followed only where they are shapes, axes or bounds: up to 64 integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mopt.backends.onnx.wire import ELEMENT_BITS

if TYPE_CHECKING:
    import onnx

VARIES: Literal["varies"] = "varies"
Size = int | Literal["varies"] | None
Sizes = tuple[Size, ...]

MOST_CONTENTS = 64
WIDEST = 8
_LARGEST_SIZE = 1 << 48
_INTEGER_TYPES = frozenset({6, 7, 9})

_ARITHMETIC: dict[str, Callable[..., int]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else 0,
    "Max": lambda *numbers: max(numbers),
    "Min": lambda *numbers: min(numbers),
    "Equal": lambda a, b: int(a == b),
    "Where": lambda c, a, b: a if c else b,
}


class UnboundedError(Exception):
    """A constant of a size that is not known here may be made."""


@dataclass(frozen=True)
class Value:
    """``elements`` bounds the elements of a constant (None: not known), ``width`` their bytes."""

    shape: Sizes | None = None
    contents: Sizes | None = None
    is_constant: bool = False
    elements: int | None = None
    width: int = WIDEST

    @property
    def nbytes(self) -> int:
        """Bound on the bytes of a constant; UnboundedError where there is none."""
        if self.elements is None:
            raise UnboundedError
        return self.elements * self.width

    @property
    def integers(self) -> tuple[int, ...] | None:
        """The contents, if every one is a number."""
        found = tuple(n for n in self.contents or () if isinstance(n, int))
        return found if self.contents is not None and len(found) == len(self.contents) else None


def count(shape: Sizes | None) -> int | None:
    """The number of elements of a fully known shape."""
    if shape is None:
        return None
    fixed = [n for n in shape if isinstance(n, int)]
    return math.prod(fixed) if len(fixed) == len(shape) else None


def fixed(shape: Sequence[int], contents: Iterable[int] | None = None, width: int = 8) -> Value:
    """A constant of known shape; contents are kept if they are few."""
    sizes = tuple(shape)
    elements = math.prod(sizes)
    kept = tuple(contents) if contents is not None and elements <= MOST_CONTENTS else None
    return Value(sizes, kept, True, elements, width)


def checked_sizes(sizes: Iterable[Size]) -> Sizes:
    """Sizes of a shape; UnboundedError for numbers no shape can have."""
    found = tuple(sizes)
    if any(isinstance(size, int) and not 0 <= size <= _LARGEST_SIZE for size in found):
        raise UnboundedError
    return found


def broadcast(shapes: Sequence[Sizes | None]) -> Sizes | None:
    """The shape of an elementwise operator, as shape inference finds it."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes) or not known:
        return None
    rank = max(len(shape) for shape in known)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in known]
    return tuple(_broadcast_size(sizes) for sizes in zip(*padded, strict=True))


def _broadcast_size(sizes: Sequence[Size]) -> Size:
    numbers = [size for size in sizes if isinstance(size, int) and size != 1]
    if numbers:
        return 0 if 0 in numbers else max(numbers)
    if None in sizes:
        return None
    return VARIES if VARIES in sizes else 1


def computed(op: str, operands: Sequence[Sizes | None]) -> Sizes | None:
    """What an elementwise operator makes of known contents; None for others."""
    rows = [row for row in operands if row]
    length = max((len(row) for row in rows), default=0)
    uneven = any(len(row) not in (1, length) for row in rows)
    if op not in _ARITHMETIC or len(rows) < len(operands) or uneven:
        return None
    if op not in ("Max", "Min") and len(rows) != (3 if op == "Where" else 2):
        return None
    columns = zip(*(row * (length // len(row)) for row in rows), strict=True)
    return tuple(_compute(op, column) for column in columns)


def _compute(op: str, operands: Sequence[Size]) -> Size:
    numbers = [n for n in operands if isinstance(n, int)]
    if len(numbers) == len(operands):
        result = _ARITHMETIC[op](*numbers)
        # Beyond 64 bits a runtime wraps around; following such numbers would take ever longer.
        return result if abs(result) < 1 << 62 else None
    # A comparison or a choice may come out the same whatever varies.
    return VARIES if None not in operands and op in ("Add", "Sub", "Mul", "Div") else None


def value_of_tensor(tensor: onnx.TensorProto) -> Value:
    """An initializer or attribute, whose bytes may be left out if they are many."""
    from onnx import numpy_helper

    shape = tuple(tensor.dims)
    width = -(-ELEMENT_BITS.get(tensor.data_type, 64) // 8)
    is_small = math.prod(shape) <= MOST_CONTENTS and not tensor.data_location
    if tensor.data_type not in _INTEGER_TYPES or not is_small:
        return fixed(shape, width=width)
    try:
        contents = numpy_helper.to_array(tensor).reshape(-1)
    except (ValueError, TypeError) as e:
        raise UnboundedError from e
    return fixed(shape, (int(n) for n in contents), width)


def value_of_constant(node: onnx.NodeProto) -> Value:
    """What a Constant node holds."""
    for attribute in node.attribute:
        if attribute.name == "value":
            return value_of_tensor(attribute.t)
        if attribute.name == "value_int":
            return fixed((), [attribute.i])
        if attribute.name == "value_ints":
            return fixed((len(attribute.ints),), attribute.ints)
        if attribute.name == "value_float":
            return fixed(())
        if attribute.name == "value_floats":
            return fixed((len(attribute.floats),))
    raise UnboundedError


def value_of_input(declared: onnx.ValueInfoProto) -> Value:
    """An input of the model, by what the file declares: it is what the runtime will believe."""
    kind = declared.type.tensor_type
    if not kind.HasField("shape"):
        return Value()
    return Value(
        tuple(size.dim_value if size.HasField("dim_value") else VARIES for size in kind.shape.dim)
    )


def integer_attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def integers_attribute(node: onnx.NodeProto, name: str) -> tuple[int, ...] | None:
    """A list attribute, or None."""
    return next((tuple(a.ints) for a in node.attribute if a.name == name), None)
