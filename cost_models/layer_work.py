"""What a layer of a model becomes in a format: the operators, their shapes and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mopt.cost import Work
from mopt.errors import UsageError, quote

_FLOAT = 4


def layer_works(
    kind: str,
    shape: Sequence[int],
    weight_format: str = "fp32",
    *,
    rows: int = 1,
    geometry: Mapping[str, Any] | None = None,
    sharers: int = 1,
    path: str = "",
) -> list[Work]:
    """The work of a layer (see ``mopt.cost.CostModel.layer_cost``), the product itself first.

    What the format adds follows: rounding activations to 8 bits where it is not part of the
    product's kernel, divided by the ``sharers`` that use the result.
    """
    shape = tuple(shape)
    weight_bytes = float(format_bytes(weight_format, shape))
    if kind == "linear":
        outputs, inputs = shape
        main = Work(
            "linear", 2.0 * rows * outputs * inputs, weight_bytes,
            _FLOAT * rows * (outputs + inputs), weight_format, path, rows, (rows, outputs, inputs),
        )  # fmt: skip
        reads = rows * inputs
    elif kind == "convolution":
        main = convolution_work(shape, weight_format, weight_bytes, rows, geometry or {}, path)
        reads = int(main.activation_bytes // _FLOAT) - rows * shape[0]
    elif kind == "embedding":
        width = shape[1]
        per_row = weight_bytes / shape[0]
        return [Work(
            "embedding", 0.0, rows * per_row, _FLOAT * rows * width, weight_format, path, rows,
            (rows, width),
        )]  # fmt: skip
    else:
        raise UsageError(f"no kind of layer is called {quote(kind)}", code="unknown-layer-kind")
    if weight_format.startswith("int8-dynamic") and sharers > 1:
        rounding = Work(
            "quantize", 2.0 * reads / sharers, 0.0, (_FLOAT + 1) * reads / sharers, "fp32", path,
            rows, (reads // sharers,),
        )  # fmt: skip
        return [main, rounding]
    return [main]


def convolution_work(
    shape: tuple[int, ...],
    weight_format: str,
    weight_bytes: float,
    rows: int,
    geometry: Mapping[str, Any],
    path: str = "",
) -> Work:
    """A convolution with a weight (outputs, inputs / groups, *kernel) at ``rows`` positions."""
    outputs, per_group, *kernel = shape
    groups = int(geometry.get("groups", 1))
    batch = int(geometry.get("batch", 1))
    positions = tuple(geometry.get("output") or (max(rows // batch, 1),) + (1,) * (len(kernel) - 1))
    stride = geometry.get("stride", 1)
    strides = (stride,) * len(kernel) if isinstance(stride, int) else tuple(stride)
    places = batch * math.prod(positions)
    read = batch * per_group * groups * math.prod(
        size * step for size, step in zip(positions, strides, strict=True)
    )  # fmt: skip
    return Work(
        "convolution",
        2.0 * places * math.prod(shape),
        weight_bytes,
        _FLOAT * float(places * outputs + read),
        weight_format,
        path,
        rows,
        (batch, per_group * groups, outputs, groups, *positions, *kernel),
    )


def format_bytes(weight_format: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight in a format."""
    if weight_format == "fp32":
        return _FLOAT * math.prod(shape)
    from mopt.formats import find_format

    return find_format(weight_format).size_bytes(shape)
