"""Packs weights for the kernels: from the operators' own codes to planes within units of K.

A unit is ``unit`` neighbouring columns. Of 4-bit codes byte ``j`` of a unit holds column ``j`` in
its low and column ``j + unit / 2`` in its high nibble; 2-bit codes have four planes likewise. 3-bit
codes are stored as such a 2-bit part and one with the third bits, two of them a plane. 8-bit codes
are bytes in order, integers with their sign.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mopt.backends.triton.kernel import round_up
from mopt.backends.triton.kernels.linear_codes import BITS, PADDED, PackedWeight
from mopt.levels import levels
from mopt.ops import unpack_bits, unpack_zero_points

# A product needs 16 columns, and so does each plane of a unit.
_LEAST_UNIT = {8: 32, 4: 32, 3: 128, 2: 64}
_LARGEST_UNIT = 128


def unit_of(kind: str, group: int, columns: int) -> int:
    """Columns of a unit: the group where that is enough for the planes, else a multiple of it."""
    if group:
        return max(group, _LEAST_UNIT[BITS[kind]])
    return _LARGEST_UNIT if columns >= _LARGEST_UNIT else _LEAST_UNIT[BITS[kind]]


def pack_planes(codes: Tensor, bits: int, unit: int) -> tuple[Tensor, Tensor | None]:
    """Unsigned codes (N, K), K a multiple of ``unit``, as bytes in planes; the third bits of 3."""
    rows = codes.shape[0]
    grouped = codes.to(torch.int32).view(rows, -1, unit)
    if bits == 8:
        return grouped.to(torch.uint8).view(rows, -1), None
    low, planes = (grouped & 3, 4) if bits == 3 else (grouped, 8 // bits)
    step = 8 // planes
    split = low.view(rows, -1, planes, unit // planes)
    packed = sum(
        (split[:, :, p] << (step * p) for p in range(planes)), torch.zeros_like(split[:, :, 0])
    )
    top = None
    if bits == 3:
        high = (grouped >> 2).view(rows, -1, 8, unit // 8)
        joined = sum((high[:, :, p] << p for p in range(8)), torch.zeros_like(high[:, :, 0]))
        top = joined.to(torch.uint8).reshape(rows, -1)
    return packed.to(torch.uint8).reshape(rows, -1), top


def unpack_planes(packed: Tensor, bits: int, unit: int, top: Tensor | None = None) -> Tensor:
    """The inverse of :func:`pack_planes`: codes (N, K) int32."""
    rows = packed.shape[0]
    wide = packed.to(torch.int32)
    if bits == 8:
        return wide
    planes = 4 if bits == 3 else 8 // bits
    step = 8 // planes
    split = wide.view(rows, -1, 1, unit // planes)
    shifts = torch.arange(planes, device=packed.device, dtype=torch.int32).view(1, 1, -1, 1)
    codes = ((split >> (step * shifts)) & (2**step - 1)).reshape(rows, -1, unit)
    if bits == 3:
        assert top is not None
        third = top.to(torch.int32).view(rows, -1, 1, unit // 8)
        shifts = torch.arange(8, device=packed.device, dtype=torch.int32).view(1, 1, -1, 1)
        codes = codes + 4 * ((third >> shifts) & 1).reshape(rows, -1, unit)
    return codes.reshape(rows, -1)


def pack_blocks(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, columns: int
) -> PackedWeight:
    """The weight of ``mopt::linear_nbits``.

    4-bit codes that only use the eight levels around the middle are stored in 3 bits.
    """
    rows, blocks, block_bytes = codes.shape
    group = block_bytes * 8 // bits
    wide = unpack_bits(codes, bits, group).reshape(rows, blocks * group)[:, :columns]
    kind, middle = f"int{bits}", 2 ** (bits - 1)
    if bits == 4 and zero_points is None and _uses_three_bits(wide) and group in (32, 64, 128):
        kind, wide, middle = "int3", wide.to(torch.int32) - 4, 4
    zeros = None
    if zero_points is not None:
        unpacked = unpack_zero_points(zero_points, bits, blocks).to(torch.int32)
        zeros = (unpacked - middle).to(scales.dtype)
    if kind == "int8":
        wide = (wide.to(torch.int32) - 128) & 255
    return _pack(kind, wide, scales, group, columns, zeros=zeros, fill=middle % 128)


def pack_levels(
    codes: Tensor, scales: Tensor, tables: Tensor | None, tensor_scale: Tensor | None,
    kind: str, scale_kind: str, columns: int,
) -> PackedWeight:  # fmt: skip
    """The weight of ``mopt::decode_levels``."""
    found = levels(kind)
    rows, blocks, block_bytes = codes.shape
    group = block_bytes * 8 // found.bits
    wide = unpack_bits(codes, found.bits, group).reshape(rows, blocks * group)[:, :columns]
    steps = scales
    if scale_kind != "float32":
        steps = levels(scale_kind).tables[0].to(codes.device)[scales.long()]
    if tensor_scale is not None:
        steps = steps * tensor_scale
    extra = None
    if tables is not None:
        chosen = unpack_bits(tables, 2, blocks).long()
        extra = found.tables[:, 15].to(codes.device)[chosen]
    return _pack(kind, wide, steps, 0 if blocks == 1 else group, columns, extra=extra)


def _uses_three_bits(codes: Tensor) -> bool:
    return bool(codes.numel()) and int(codes.min()) >= 4 and int(codes.max()) <= 11


def _pack(
    kind: str, codes: Tensor, scales: Tensor, group: int, columns: int, *,
    zeros: Tensor | None = None, extra: Tensor | None = None, fill: int = 0,
) -> PackedWeight:  # fmt: skip
    rows = codes.shape[0]
    unit = unit_of(kind, group, columns)
    padded_rows, padded_columns = round_up(rows, PADDED), round_up(columns, unit)
    shape = (0, padded_columns - columns, 0, padded_rows - rows)
    wide = F.pad(codes.to(torch.int32), shape, value=fill)
    packed, top = pack_planes(wide, BITS[kind], unit)
    groups = padded_columns // group if group else 1

    def across(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        more = (0, groups - values.shape[1], 0, padded_rows - rows)
        return F.pad(values, more).t().contiguous()

    stored = across(scales)
    assert stored is not None
    return PackedWeight(
        kind, rows, columns, group, unit, packed, stored, across(zeros), across(extra), top
    )
