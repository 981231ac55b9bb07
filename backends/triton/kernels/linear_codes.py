"""Weight-only linear: codes of 2, 3, 4 or 8 bits, 8-bit floats, NF4, MXFP4, NVFP4 and BitMoD.

One kernel for one row (few rows, weights split along K over the chip) and for many (large tiles).
Weights stand [N, K] in units along K, planar within a unit: a plane is one shift and mask away and
meets its own columns of the input, so nothing is interleaved. Where a group fills a unit its scale
multiplies the fp32 sum of the group, so that integers stay exact; otherwise it multiplies weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import Amount, Problem, compute_type, round_up
from mopt.backends.triton.kernels._codes import (
    plane_of_ints,
    plane_of_three_bits,
    planes_of_levels,
    small_float,
)
from mopt.backends.triton.launch import Launch, Runner, Tile, tile

# Bits of a code, and planes in a byte of it.
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "e4m3": 8, "e5m2": 8, "nf4": 4, "e2m1": 4,
        "bitmod4": 4}  # fmt: skip
LEVELS = ("nf4", "e2m1", "bitmod4")
# Rows of the weight are padded to a multiple of this when they are packed, so no load is masked.
PADDED = 128


@dataclass(frozen=True)
class PackedWeight:
    """A weight as the kernel reads it; see ``mopt.backends.triton.planes`` for how it is made.

    ``codes`` uint8 (N padded, units * bytes); ``top`` the third bits of ``int3``; ``scales``
    (groups, N padded), or (1, N padded) where ``group`` is 0: one scale a row; ``zeros`` the zero
    points less the middle of the range, ``extra`` the special value of each BitMoD group, both
    shaped as ``scales``.
    """

    kind: str
    outputs: int
    columns: int
    group: int
    unit: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    extra: Tensor | None = None
    top: Tensor | None = None

    @property
    def units(self) -> int:
        """Units along K."""
        return round_up(self.columns, self.unit) // self.unit

    def to(self, device: Any) -> PackedWeight:
        """The same on another device."""
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return PackedWeight(**moved)

    @property
    def bytes(self) -> int:
        """Bytes read in one pass over the weight."""
        tensors = (self.codes, self.scales, self.zeros, self.extra, self.top)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@triton.jit
def _columns(x, row, keep, stride, first, WIDTH: tl.constexpr, columns, EVEN: tl.constexpr,
             CT: tl.constexpr):  # fmt: skip
    """Columns ``first``.. of the input, as the dot takes them."""
    at = first + tl.arange(0, WIDTH)
    mask = keep[:, None]
    if not EVEN:
        mask = mask & (at < columns)[None, :]
    return tl.load(x + row[:, None] * stride + at[None, :], mask=mask, other=0.0)


@triton.jit
def _product(values, weight, scale, acc, SCALED: tl.constexpr, CT: tl.constexpr):
    """``acc + values @ (weight * scale).T``."""
    if SCALED:
        weight = (weight.to(tl.float32) * scale).to(CT)
    return tl.dot(values.to(CT), tl.trans(weight), acc, input_precision="tf32")


@triton.jit
def _scale(scales, unit, n, first, padded, WIDTH: tl.constexpr, UNIT: tl.constexpr,
           GROUP: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """The scale of every weight of a plane, where groups are smaller than a unit."""
    if SCALED:
        group = unit * (UNIT // GROUP) + (first + tl.arange(0, WIDTH)) // GROUP
        return tl.load(scales + group[None, :] * padded + n[:, None]).to(tl.float32)
    else:
        return 1.0


@triton.jit(do_not_specialize=["rows", "units", "share"])
def linear_codes(
    x, codes, top, scales, zeros, extra, bias, out, partial, counters,
    rows, outputs, columns, stride, padded, units, share,
    KIND: tl.constexpr, CT: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, JOIN: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One block of ``x @ decoded(codes).T + bias``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    keep = row < rows
    row = row.to(tl.int64)
    SCALED: tl.constexpr = GROUP > 0 and GROUP < UNIT
    PLANES: tl.constexpr = (
        1
        if (KIND == "int8" or KIND == "e4m3" or KIND == "e5m2")
        else (4 if (KIND == "int2" or KIND == "int3") else 2)
    )
    PLANE: tl.constexpr = UNIT // PLANES
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    first = part * share
    last = tl.minimum(first + share, units)
    line = codes + n[:, None].to(tl.int64) * (units * PLANE)
    for unit in range(first, last):
        k = unit * UNIT
        if GROUP == UNIT:
            total = tl.zeros((BM, BN), dtype=tl.float32)
        else:
            total = acc
        sums = tl.zeros((BM,), dtype=tl.float32)
        if KIND == "int3":
            HALF: tl.constexpr = PLANE // 2
            even = tl.load(line + unit * PLANE + tl.arange(0, HALF)[None, :])
            odd = tl.load(line + unit * PLANE + HALF + tl.arange(0, HALF)[None, :])
            single = tl.load(
                top
                + n[:, None].to(tl.int64) * (units * HALF)
                + unit * HALF
                + tl.arange(0, HALF)[None, :]
            )
            for p in tl.static_range(4):
                c = k + p * PLANE
                w = plane_of_three_bits(even, single, p, 0, CT)
                s = _scale(scales, unit, n, p * PLANE, padded, HALF, UNIT, GROUP, SCALED)
                v = _columns(x, row, keep, stride, c, HALF, columns, EVEN, CT)
                total = _product(v, w, s, total, SCALED, CT)
                w = plane_of_three_bits(odd, single, p, 1, CT)
                s = _scale(scales, unit, n, p * PLANE + HALF, padded, HALF, UNIT, GROUP, SCALED)
                v = _columns(x, row, keep, stride, c + HALF, HALF, columns, EVEN, CT)
                total = _product(v, w, s, total, SCALED, CT)
        else:
            raw = tl.load(line + unit * PLANE + tl.arange(0, PLANE)[None, :])
            if KIND == "nf4" or KIND == "e2m1" or KIND == "bitmod4":
                low, high = planes_of_levels(raw, KIND, CT, ARCH)
                if KIND == "bitmod4":
                    # The sixteenth level is the group's own.
                    special = tl.load(extra + unit * padded + n).to(tl.float32).to(CT)[:, None]
                    low = tl.where((raw & 15) == 15, special, low)
                    high = tl.where(raw >= 240, special, high)
                s = _scale(scales, unit, n, 0, padded, PLANE, UNIT, GROUP, SCALED)
                v = _columns(x, row, keep, stride, k, PLANE, columns, EVEN, CT)
                total = _product(v, low, s, total, SCALED, CT)
                s = _scale(scales, unit, n, PLANE, padded, PLANE, UNIT, GROUP, SCALED)
                v = _columns(x, row, keep, stride, k + PLANE, PLANE, columns, EVEN, CT)
                total = _product(v, high, s, total, SCALED, CT)
            else:
                for p in tl.static_range(PLANES):
                    v = _columns(x, row, keep, stride, k + p * PLANE, PLANE, columns, EVEN, CT)
                    if KIND == "int8":
                        w = raw.to(tl.int8, bitcast=True).to(CT)
                    elif KIND == "e4m3" or KIND == "e5m2":
                        w = small_float(raw, KIND, CT)
                    else:
                        w = plane_of_ints(raw, p, 8 // PLANES, CT, ARCH)
                    if HAS_ZEROS:
                        if SCALED:
                            z = _scale(zeros, unit, n, p * PLANE, padded, PLANE, UNIT, GROUP, True)
                            w = (w.to(tl.float32) - z).to(CT)
                        else:
                            sums += tl.sum(v.to(tl.float32), axis=1)
                    s = _scale(scales, unit, n, p * PLANE, padded, PLANE, UNIT, GROUP, SCALED)
                    total = _product(v, w, s, total, SCALED, CT)
        if GROUP == UNIT:
            s = tl.load(scales + unit * padded + n).to(tl.float32)
            if HAS_ZEROS:
                z = tl.load(zeros + unit * padded + n).to(tl.float32)
                total -= sums[:, None] * z[None, :]
            acc += total * s[None, :]
        else:
            acc = total
    if GROUP == 0:
        acc *= tl.load(scales + n).to(tl.float32)[None, :]
    mask = keep[:, None] & (n < outputs)[None, :]
    at = row[:, None] * outputs + n[None, :]
    if JOIN:
        # The block that comes last adds the parts in their order: the sum does not depend on time.
        slab = rows.to(tl.int64) * outputs
        tl.store(partial + part * slab + at, acc, mask=mask)
        tl.debug_barrier()
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        arrived = tl.atomic_add(counters + place, 1, sem="acq_rel")
        if arrived == tl.num_programs(2) - 1:
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for other in range(tl.num_programs(2)):
                acc += tl.load(
                    partial + other * slab + at, mask=mask, other=0.0, cache_modifier=".cg"
                )
            if HAS_BIAS:
                acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
            tl.store(counters + place, 0)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


def call(
    run: Runner, config: Tile, x: Tensor, weight: PackedWeight, bias: Tensor | None,
    counters: Tensor,
) -> Tensor:  # fmt: skip
    """``x @ weight.T + bias`` for ``x`` (rows, columns); ``counters`` are zeros, left as zeros."""
    rows, outputs = x.shape[0], weight.outputs
    out = x.new_empty((rows, outputs))
    if not out.numel():
        return out
    split, units = config["SPLIT"], weight.units
    share = -(-units // split)
    partial = out
    if split > 1:
        partial = x.new_empty((split, rows, outputs), dtype=torch.float32)
    padded = weight.codes.shape[0]
    grid = (padded // config["BN"], -(-rows // config["BM"]), split)
    none = weight.scales
    run(
        Launch(
            linear_codes,
            grid,
            {
                "x": x, "codes": weight.codes,
                "top": weight.codes if weight.top is None else weight.top,
                "scales": weight.scales,
                "zeros": none if weight.zeros is None else weight.zeros,
                "extra": none if weight.extra is None else weight.extra,
                "bias": none if bias is None else bias,
                "out": out, "partial": partial, "counters": counters, "rows": rows,
                "outputs": outputs, "columns": weight.columns, "stride": x.stride(0),
                "padded": padded, "units": units, "share": share,
            },
            {
                "KIND": weight.kind, "CT": compute_type(x.dtype), "GROUP": weight.group,
                "UNIT": weight.unit, "HAS_ZEROS": weight.zeros is not None,
                "HAS_BIAS": bias is not None, "EVEN": weight.columns % weight.unit == 0,
                "BM": config["BM"], "BN": config["BN"], "JOIN": split > 1,
            },
            ("out", "partial", "counters"),
            config.warps,
            config.stages,
        )
    )  # fmt: skip
    return out


def counters_needed(weight: PackedWeight) -> int:
    """How many counters a call may touch: one a block of outputs, for up to 64 rows."""
    return 4 * weight.codes.shape[0] // 16


def legal(config: Tile, problem: Problem) -> str | None:
    """Why a tile cannot compute a problem, or None."""
    if PADDED % config["BN"]:
        return f"BN {config['BN']} does not divide the padding of {PADDED} rows"
    if config["SPLIT"] > 1 and problem["rows"] > 64:
        return "the parts of more than 64 rows take longer to add than to compute"
    if config["SPLIT"] > problem["units"]:
        return f"{problem['units']} units cannot be split in {config['SPLIT']}"
    return None


def work(problem: Problem) -> Amount:
    """Operations and bytes; codes cost instructions to decode besides."""
    rows, outputs, columns = problem["rows"], problem["outputs"], problem["columns"]
    kind, group, size = problem["kind"], problem["group"], problem["itemsize"]
    groups = columns / group if group else 1
    weights = outputs * (columns * BITS[kind] / 8 + groups * 4)
    # Counted in the machine code of the loop (see docs/triton.md), with the product's own.
    decode = {"int8": 3.5, "int4": 3.2, "int3": 8.0, "int2": 3.0, "e4m3": 4.0, "e5m2": 3.5}
    return Amount(
        2.0 * rows * outputs * columns,
        weights,
        size * rows * (columns + outputs),
        decode.get(kind, 5.7) * outputs * columns,
    )


def space(problem: Problem) -> list[Tile]:
    """Tiles worth trying for so many rows."""
    rows = problem["rows"]
    if rows <= 64:
        bm = 16 if rows <= 16 else 32 if rows <= 32 else 64
        splits = [s for s in (1, 2, 4, 8, 16) if s <= max(1, problem["units"] // 2)]
        return [
            tile(warps, stages, BM=bm, BN=bn, SPLIT=split)
            for split in splits
            for bn, warps, stages in (
                (128, 4, 4), (64, 4, 4), (64, 2, 5), (32, 4, 5), (128, 8, 3), (128, 4, 2),
                (64, 4, 2), (32, 4, 2),
            )
        ]  # fmt: skip
    return [
        tile(warps, stages, BM=bm, BN=bn, SPLIT=1)
        for bm, bn, warps, stages in (
            (128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3),
            (64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2),
        )
    ]  # fmt: skip
