"""What a layer of a model becomes in a format: the operators, their sizes and bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mopt.cost import Work
from mopt.cost_models.families import families
from mopt.cost_models.family import Dims
from mopt.errors import UsageError, quote

_FLOAT = 4
_BLOCKS = re.compile(r"int(\d)-(?:g(\d+)|channel)(?:-asym)?(-afloat)?")
# Stored in 16 bits, widened when the model is loaded, computed with as ever.
_WIDENED = ("fp32", "fp16", "bf16")


def layer_works(
    kind: str,
    shape: Sequence[int],
    weight_format: str = "fp32",
    *,
    rows: int = 1,
    geometry: Mapping[str, Any] | None = None,
    sharers: int = 1,
    isolated: bool = True,
    path: str = "",
) -> list[Work]:
    """The work of a layer (see ``mopt.cost.CostModel.layer_cost``), the product itself first."""
    shape = tuple(shape)
    if kind == "linear":
        return _linear(shape, weight_format, rows, geometry or {}, sharers, isolated, path)
    if kind == "convolution":
        return _convolution(shape, weight_format, rows, geometry or {}, isolated, path)
    if kind == "embedding":
        return _embedding(shape, weight_format, rows, path)
    raise UsageError(f"no kind of layer is called {quote(kind)}", code="unknown-layer-kind")


def format_bytes(weight_format: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight in a format."""
    if weight_format == "fp32":
        return _FLOAT * math.prod(shape)
    from mopt.formats import find_format

    return find_format(weight_format).size_bytes(shape)


def _linear(
    shape: Dims,
    weight_format: str,
    rows: int,
    geometry: Mapping[str, Any],
    sharers: int,
    isolated: bool,
    path: str,
) -> list[Work]:
    outputs, inputs = shape
    sizes: Dims = (rows, outputs, inputs)
    added = []
    blocks = _BLOCKS.fullmatch(weight_format)
    if weight_format in _WIDENED:
        family = "linear.fp32" if geometry.get("bias", True) else "linear.fp32-bare"
    elif weight_format.startswith("int8-dynamic"):
        family = "linear.int8-dynamic" if sharers == 1 else "linear.int8-shared"
        if sharers > 1:
            added = [_shared("quantize.dynamic", rows * inputs, sharers, path)]
    elif weight_format.startswith("int8-qdq"):
        # Between float neighbours the input is rounded, once for all that read it, and the product
        # widens its own result; between others in 8 bits neither is needed.
        family = "linear.int8-shared" if isolated else "linear.int8-static"
        if isolated:
            added = [_shared("quantize.linear", rows * inputs, sharers, path)]
    elif blocks is not None:
        if blocks[3] and blocks[1] != "4":
            raise _no_kernel(weight_format, path, "with float activations only 4 bits have one")
        family = "linear.int4-float" if blocks[3] else f"linear.int{blocks[1]}-blocks"
        sizes = (*sizes, int(blocks[2]) if blocks[2] else _channel_block(weight_format, inputs))
    else:
        raise _no_kernel(weight_format, path)
    return [_layer(family, sizes, shape, weight_format, rows, path), *added]


def _convolution(
    shape: Dims,
    weight_format: str,
    rows: int,
    geometry: Mapping[str, Any],
    isolated: bool,
    path: str,
) -> list[Work]:
    outputs, per_group, *kernel = shape
    groups = int(geometry.get("groups", 1))
    batch = int(geometry.get("batch", 1))
    inputs = per_group * groups
    places = geometry.get("output") or (max(rows // batch, 1), *[1] * (len(kernel) - 1))
    stride = geometry.get("stride", 1)
    step = int(stride if isinstance(stride, int) else max(stride))
    head = (batch, inputs, outputs, groups, *(int(size) for size in places), *kernel)
    read = batch * inputs * math.prod(places) * step ** len(kernel)
    added = []
    if geometry.get("transposed"):
        if weight_format not in _WIDENED:
            raise _no_kernel(weight_format, path, "transposed convolutions are computed in float")
        # Here the first axis of the weight counts the inputs.
        head = (batch, outputs, per_group * groups, groups, *head[4:])
        family = "convolution.transposed" if len(kernel) == 2 else "convolution.plain"
        sizes: Dims = (*head, step) if len(kernel) == 2 else head
    elif weight_format.startswith("int8-qdq"):
        if len(kernel) != 2:
            raise _no_kernel(weight_format, path, "only two-dimensional convolutions have one")
        is_depthwise = groups > 1 and per_group == 1
        family = "convolution.int8-depthwise" if is_depthwise else "convolution.int8"
        sizes = (*head, step)
        added = _borders(read, rows * outputs, 1, isolated, path)
    elif weight_format in _WIDENED:
        is_depthwise = groups > 1 and per_group == 1
        family, sizes = "convolution.plain", head
        if len(kernel) == 2:
            family = "convolution.depthwise" if is_depthwise else "convolution.fp32"
            sizes = (*head, step)
    else:
        raise _no_kernel(weight_format, path)
    return [_layer(family, sizes, shape, weight_format, rows, path), *added]


def _embedding(shape: Dims, weight_format: str, rows: int, path: str) -> list[Work]:
    width = shape[1]
    if weight_format == "fp32":
        return [_layer("embedding.fp32", (rows, width), shape, "fp32", rows, path)]
    if weight_format in _WIDENED:
        looked_up = _layer(
            "embedding.fp32", (rows, max(width // 2, 1)), shape, weight_format, rows, path
        )
        return [looked_up, _work("move.cast", (rows * width,), path)]
    if weight_format.startswith("int8-row"):
        # Codes and scales are looked up, codes made floats and multiplied.
        return [
            _layer("embedding.fp32", (rows, max(width // 4, 1)), shape, weight_format, rows, path),
            _work("embedding.fp32", (rows, 1), path),
            _work("move.cast", (rows * width,), path),
            _work("pointwise.column", (rows, width), path),
        ]
    raise _no_kernel(weight_format, path)


def _layer(family: str, sizes: Dims, shape: Dims, weight_format: str, rows: int, path: str) -> Work:
    """The product itself, with the bytes that the format stores."""
    amount = families()[family].amount(sizes)
    kind = families()[family].kind
    stored = float(format_bytes(weight_format, shape))
    weight_bytes = stored if kind != "embedding" else stored / shape[0] * rows
    return Work(
        kind, amount.flops, weight_bytes, amount.activation_bytes, weight_format, path,
        rows, sizes, "", family,
    )  # fmt: skip


def _work(family: str, sizes: Dims, path: str) -> Work:
    found = families()[family]
    amount = found.amount(sizes)
    return Work(
        found.kind, amount.flops, amount.weight_bytes, amount.activation_bytes,
        found.weight_format, path, 1, sizes, "", family,
    )  # fmt: skip


def _shared(family: str, count: int, sharers: int, path: str) -> Work:
    """One layer's part of work that several have in common."""
    return _work(family, (max(count // sharers, 1),), path)


def _borders(read: int, written: int, sharers: int, isolated: bool, path: str) -> list[Work]:
    """Rounding the input and widening the output, where the neighbours compute in float."""
    if not isolated:
        return []
    return [
        _shared("quantize.linear", read, sharers, path),
        _work("quantize.dequantize", (written,), path),
    ]


def _channel_block(weight_format: str, inputs: int) -> int:
    from mopt.formats import find_format

    return int(find_format(weight_format).block(inputs))  # type: ignore[attr-defined]


def _no_kernel(weight_format: str, path: str, why: str = "") -> UsageError:
    where = f" of {path!r}" if path else ""
    return UsageError(
        f"no kernel computes a layer{where} in {quote(weight_format)}{'; ' + why if why else ''}",
        code="no-kernel",
    )
