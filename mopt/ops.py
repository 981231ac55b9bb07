"""The ``mopt::`` operators: what a pass may put into a graph in place of a plain layer.

Every operator has a reference implementation in plain torch (what it *means*) and a shape rule, so
the eager backend runs it as it is and other backends lower it to a kernel with the same meaning.
Rounding follows ONNX: ``saturate(round_half_even(x / scale) + zero_point)``.

Packed layouts are those of ONNX Runtime's ``MatMulNBits``: codes are grouped along K in blocks,
low bits first; zero points are packed the same way, each row padded to a byte.

Importing this module registers the operators; nothing else happens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mopt.levels import levels

__all__ = ["pack_bits", "pack_zero_points", "unpack_bits", "unpack_zero_points"]

# Weights that the reference of a product has as floats at a time.
_DECODED_TOGETHER = 1 << 23


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes of the last axis, low bits first.

    ``codes`` is integer of shape (..., n) with values below ``2**bits`` and bits in {2, 4, 8}; the
    result is uint8 of shape (..., ceil(n * bits / 8)), padded with zero codes.
    """
    per_byte = 8 // bits
    pad = -codes.shape[-1] % per_byte
    wide = F.pad(codes.to(torch.int32), (0, pad)).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(per_byte, dtype=torch.int32, device=codes.device) * bits
    return (wide << shifts).sum(-1, dtype=torch.int32).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`: uint8 codes of shape (..., count)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def pack_zero_points(zero_points: Tensor, bits: int) -> Tensor:
    """Zero points (N, blocks) as uint8 (N, ceil(blocks * bits / 8)), each row padded to a byte."""
    return pack_bits(zero_points, bits)


def unpack_zero_points(packed: Tensor, bits: int, blocks: int) -> Tensor:
    """The inverse of :func:`pack_zero_points`."""
    return unpack_bits(packed, bits, blocks)


def dequantize_blocks(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, in_features: int
) -> Tensor:
    """The weight (N, in_features) that packed blocks stand for, in the dtype of ``scales``."""
    rows, blocks, block_bytes = codes.shape
    block = block_bytes * 8 // bits
    values = unpack_bits(codes, bits, block).to(scales.dtype)
    if zero_points is None:
        zero = torch.full((1, 1, 1), 2 ** (bits - 1), dtype=scales.dtype, device=codes.device)
    else:
        zero = unpack_zero_points(zero_points, bits, blocks).to(scales.dtype).unsqueeze(-1)
    weight = values.sub_(zero) * scales.unsqueeze(-1)
    return weight.reshape(rows, blocks * block)[:, :in_features]


@torch.library.custom_op("mopt::linear_nbits", mutates_args=())
def linear_nbits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    activations: str,
) -> Tensor:
    """``x @ dequantized(codes).T + bias`` with weights in blocks of 2, 4 or 8 bits.

    ``x`` (..., K) float; ``codes`` uint8 (N, blocks, block * bits / 8); ``scales`` (N, blocks);
    ``zero_points`` packed uint8 (N, ceil(blocks * bits / 8)) or None for ``2**(bits - 1)``;
    ``bias`` (N). ``activations`` says what a kernel may do to ``x``: "float" keeps it, "int8" lets
    it round each row and block of ``x`` to 8 bits, as this reference does. The result is (..., N).
    """
    if activations == "int8":
        block = codes.shape[2] * 8 // bits
        pad = codes.shape[1] * block - in_features
        grouped = F.pad(x, (0, pad)).unflatten(-1, (-1, block))
        step = grouped.abs().amax(-1, keepdim=True) / 127
        safe = torch.where(step > 0, step, torch.ones_like(step))
        rounded = torch.round(grouped / safe).clamp(-127, 127) * step
        x = rounded.flatten(-2)[..., :in_features]
    found = x.new_empty((*x.shape[:-1], codes.shape[0]))
    # Some rows of the weight at a time: a vocabulary's would not fit into memory as floats.
    step = max(1, _DECODED_TOGETHER // max(1, in_features))
    for at in range(0, codes.shape[0], step):
        rows = slice(at, at + step)
        zeros = None if zero_points is None else zero_points[rows]
        weight = dequantize_blocks(codes[rows], scales[rows], zeros, bits, in_features)
        found[..., rows] = F.linear(x, weight, None if bias is None else bias[rows])
    return found


@linear_nbits.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    activations: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def dynamic_uint8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX ``DynamicQuantizeLinear``: (uint8 codes, fp32 scale, uint8 zero point), per tensor.

    The scale of an all-zero tensor is 0, as ONNX Runtime computes it; its codes are 0.
    """
    low = torch.clamp(x.amin(), max=0.0)
    high = torch.clamp(x.amax(), min=0.0)
    scale = (high - low) / 255
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(torch.clamp(-low / safe, 0, 255))
    codes = torch.clamp(torch.round(x / safe) + zero, 0, 255)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


@torch.library.custom_op("mopt::linear_dynamic_int8", mutates_args=())
def linear_dynamic_int8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """An int8 linear whose activations are quantized at run time, one range for the whole tensor.

    ``x`` (..., K) fp32; ``codes`` int8 (N, K), symmetric; ``scales`` fp32 (N); ``bias`` fp32 (N).
    Lowers to ONNX Runtime's ``DynamicQuantizeMatMul``. Rows of one call share their range, so the
    result of a row depends on the others in the batch.
    """
    q, scale, zero = dynamic_uint8(x)
    # Sums of up to K products of 8-bit numbers are exact in float64.
    product = (q.double() - zero.double()) @ codes.double().t()
    y = (product * scale.double() * scales.double()).to(x.dtype)
    return y if bias is None else y + bias


@linear_dynamic_int8.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _along(values: Tensor, axis: int, rank: int) -> Tensor:
    if values.dim() == 0:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


@torch.library.custom_op("mopt::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """ONNX ``QuantizeLinear``: codes in the dtype of ``zero_point`` (uint8 or int8).

    ``scale`` and ``zero_point`` are scalars (per tensor) or 1-D along ``axis``.
    """
    limits = torch.iinfo(zero_point.dtype)
    step = _along(scale, axis, x.dim())
    zero = _along(zero_point, axis, x.dim()).to(x.dtype)
    return torch.clamp(torch.round(x / step) + zero, limits.min, limits.max).to(zero_point.dtype)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("mopt::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """ONNX ``DequantizeLinear``: ``(q - zero_point) * scale`` in the dtype of ``scale``."""
    step = _along(scale, axis, q.dim())
    zero = _along(zero_point, axis, q.dim()).to(scale.dtype)
    return (q.to(scale.dtype) - zero) * step


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


@torch.library.custom_op("mopt::embedding_int8", mutates_args=())
def embedding_int8(indices: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Rows of an int8 table: ``codes[i] * scales[i]``.

    ``indices`` integer (...); ``codes`` int8 (V, D), symmetric; ``scales`` (V, ceil(D / block)) for
    blocks along D of equal length (a power of two, at least 16, or one block). The result is
    (..., D) in the dtype of ``scales``.
    """
    width = codes.shape[1]
    block = -(-width // scales.shape[1])
    step = scales[indices].repeat_interleave(block, dim=-1)[..., :width]
    return codes[indices].to(scales.dtype) * step


@embedding_int8.register_fake
def _(indices: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return scales.new_empty((*indices.shape, codes.shape[1]))


@torch.library.custom_op("mopt::widen", mutates_args=())
def widen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight stored in 16 bits and computed with in ``dtype``: only storage is smaller."""
    return weight.to(dtype, copy=True)


@widen.register_fake
def _(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


@torch.library.custom_op("mopt::widen_int8", mutates_args=())
def widen_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """A weight stored in 8 bits, computed with in 32: ``codes`` int8 (N, ...), ``scales`` (N)."""
    return codes * scales.view(-1, *[1] * (codes.dim() - 1))


@widen_int8.register_fake
def _(codes: Tensor, scales: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scales.dtype)


@torch.library.custom_op("mopt::decode_levels", mutates_args=())
def decode_levels(
    codes: Tensor,
    scales: Tensor,
    tables: Tensor | None,
    tensor_scale: Tensor | None,
    kind: str,
    scale_kind: str,
    columns: int,
) -> Tensor:
    """The weight (N, columns), fp32, that codes of unevenly spaced levels stand for.

    ``codes`` uint8 (N, blocks, block * bits / 8) index the levels ``kind`` (see mopt.levels);
    ``scales`` (N, blocks) are fp32, or uint8 codes of ``scale_kind`` where that is not "float32";
    ``tables`` is the index of each block's table, packed uint8 (N, ceil(blocks / 4)), or None for
    kinds with one; ``tensor_scale`` is a scalar on all scales. Only storage is smaller.
    """
    found = levels(kind)
    rows, blocks, block_bytes = codes.shape
    index = unpack_bits(codes, found.bits, block_bytes * 8 // found.bits).long()
    if tables is not None:
        offset = unpack_bits(tables, 2, blocks).long() << found.bits
        index = index + offset.unsqueeze(-1)
    values = found.tables.reshape(-1).to(codes.device)[index]
    steps = scales
    if scale_kind != "float32":
        steps = levels(scale_kind).tables[0].to(codes.device)[scales.long()]
    if tensor_scale is not None:
        steps = steps * tensor_scale
    return (values * steps.unsqueeze(-1)).reshape(rows, -1)[:, :columns].contiguous()


@decode_levels.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    tables: Tensor | None,
    tensor_scale: Tensor | None,
    kind: str,
    scale_kind: str,
    columns: int,
) -> Tensor:
    return codes.new_empty((codes.shape[0], columns), dtype=torch.float32)


@torch.library.custom_op("mopt::grouped_linear_nbits", mutates_args=())
def grouped_linear_nbits(
    x: Tensor,
    ends: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: Sequence[int],
    in_features: int,
    activations: str,
) -> Tensor:
    """Rows ``x[ends[e - 1]:ends[e]]`` times the weight of expert e, transposed.

    ``x`` (S, K) float, sorted by expert; ``ends`` integer (E), never falling, the last one S;
    ``codes[e]`` and ``scales[e]`` are those of ``mopt::linear_nbits`` without zero points or bias,
    in ``bits[e]`` bits. The result is (S, N).
    """
    result = x.new_zeros(x.shape[0], codes[0].shape[0])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        result[start:end] = linear_nbits(
            x[start:end], codes[expert], scales[expert], None, None, bits[expert], in_features,
            activations,
        )  # fmt: skip
        start = end
    return result


@grouped_linear_nbits.register_fake
def _(
    x: Tensor,
    ends: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: Sequence[int],
    in_features: int,
    activations: str,
) -> Tensor:
    return x.new_empty((x.shape[0], codes[0].shape[0]))


OPERATORS = frozenset(
    {
        "linear_nbits",
        "linear_dynamic_int8",
        "quantize",
        "dequantize",
        "embedding_int8",
        "widen",
        "decode_levels",
        "grouped_linear_nbits",
    }
)
