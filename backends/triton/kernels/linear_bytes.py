"""int8 x int8 and fp8 x fp8 linear: scales per row and per channel, bias and activation fused."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import Amount, Problem
from mopt.backends.triton.kernels._numbers import activated, product_of_bytes
from mopt.backends.triton.launch import Launch, Runner, Tile, tile

ACTIVATIONS = ("none", "relu", "silu", "gelu")
# Outputs and columns of the weight are padded to a multiple of this.
PADDED = 128


@triton.jit(do_not_specialize=["rows", "row_step"])
def linear_bytes(
    a, b, row_scale, column_scale, zero, sums, bias, out,
    rows, outputs, columns, padded, row_step,
    KIND: tl.constexpr, UNSIGNED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One block of ``activation((a - zero) @ b.T * row_scale * column_scale + bias)``."""
    # Blocks that run together share rows of the weight: eight of them down a column.
    blocks_m = tl.num_programs(0)
    blocks_n = tl.num_programs(1)
    index = tl.program_id(0) + tl.program_id(1) * blocks_m
    wide = 8 * blocks_n
    first = (index // wide) * 8
    height = tl.minimum(blocks_m - first, 8)
    block_m = first + (index % wide) % height
    block_n = (index % wide) // height
    m = block_m * BM + tl.arange(0, BM)
    n = block_n * BN + tl.arange(0, BN)
    keep = m < rows
    row = m.to(tl.int64)
    left = a + row[:, None] * columns
    right = b + n[None, :].to(tl.int64) * padded
    acc = tl.zeros((BM, BN), dtype=tl.int32 if KIND == "int8" else tl.float32)
    for k in range(0, columns, BK):
        at = k + tl.arange(0, BK)
        mask = keep[:, None]
        if not EVEN:
            mask = mask & (at < columns)[None, :]
        x = tl.load(left + at[None, :], mask=mask, other=0)
        if UNSIGNED:
            # Less 128, which flips the highest bit; columns outside meet weights of 0.
            x = (x ^ 128).to(tl.int8, bitcast=True)
        w = tl.load(right + at[:, None])
        acc = product_of_bytes(x, w, acc, KIND, BK, ARCH)
    if HAS_ZERO:
        acc -= tl.load(zero) * tl.load(sums + n)[None, :]
    value = acc.to(tl.float32) * tl.load(column_scale + n)[None, :]
    value *= tl.load(row_scale + row * row_step, mask=keep, other=0.0)[:, None]
    if HAS_BIAS:
        value += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    value = activated(value, ACTIVATION)
    mask = keep[:, None] & (n < outputs)[None, :]
    tl.store(out + row[:, None] * outputs + n[None, :], value.to(out.dtype.element_ty), mask=mask)


def call(
    run: Runner, config: Tile, a: Tensor, b: Tensor, row_scale: Tensor, column_scale: Tensor,
    bias: Tensor | None, outputs: int, *, zero: Tensor | None = None, sums: Tensor | None = None,
    activation: str = "none", dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """``a`` (rows, K) and ``b`` (N padded, K padded) in 8 bits: int8, or e4m3 given as uint8.

    Where ``b`` is int8, ``a`` may be uint8 and stands for its codes less 128.
    ``row_scale`` fp32 (rows) or (1); ``column_scale`` fp32 (N padded). ``zero`` int32 (1) is taken
    from every entry of ``a``, for which ``sums`` int32 (N padded) of the rows of ``b`` are needed.
    """
    rows, columns = a.shape
    out = torch.empty((rows, outputs), dtype=dtype, device=a.device)
    if not out.numel():
        return out
    kind = "int8" if b.dtype == torch.int8 else "e4m3"
    run(
        Launch(
            linear_bytes,
            (-(-rows // config["BM"]), b.shape[0] // config["BN"]),
            {
                "a": a, "b": b, "row_scale": row_scale, "column_scale": column_scale,
                "zero": row_scale if zero is None else zero,
                "sums": column_scale if sums is None else sums,
                "bias": column_scale if bias is None else bias, "out": out, "rows": rows,
                "outputs": outputs, "columns": columns, "padded": b.shape[1],
                "row_step": 0 if row_scale.numel() == 1 else 1,
            },
            {
                "KIND": kind, "UNSIGNED": kind == "int8" and a.dtype == torch.uint8,
                "ACTIVATION": activation, "HAS_ZERO": zero is not None,
                "HAS_BIAS": bias is not None, **config.constants,
                "EVEN": columns % config["BK"] == 0,
            },
            ("out",), config.warps, config.stages,
        )
    )  # fmt: skip
    return out


def reference(
    a: Tensor, b: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None,
    outputs: int, *, zero: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """The same in float64."""
    wide, weight = _values(a), _values(b)[:outputs, : a.shape[1]]
    if zero is not None:
        wide = wide - zero.double()
    value = wide @ weight.t() * row_scale.double().reshape(-1, 1)
    value = value * column_scale.double()[:outputs]
    if bias is not None:
        value = value + bias.double()
    if activation == "none":
        return value
    found: Tensor = getattr(torch.nn.functional, activation)(value)
    return found


def _values(codes: Tensor) -> Tensor:
    return (codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)).double()


def legal(config: Tile, problem: Problem) -> str | None:
    """Why a tile cannot compute a problem, or None."""
    if PADDED % config["BN"] or config["BK"] > PADDED:
        return f"tiles must divide the padding of {PADDED}"
    return None


def work(problem: Problem) -> Amount:
    """Operations and bytes; the rate of 8-bit products is twice that of 16-bit ones."""
    rows, outputs, columns = problem["rows"], problem["outputs"], problem["columns"]
    return Amount(
        1.0 * rows * outputs * columns, outputs * (columns + 8.0),
        rows * (columns + problem["itemsize"] * outputs),
    )  # fmt: skip


def space(problem: Problem) -> list[Tile]:
    """Tiles worth trying for so many rows."""
    if problem["rows"] <= 64:
        bm = 16 if problem["rows"] <= 16 else 32 if problem["rows"] <= 32 else 64
        shapes: tuple[tuple[int, ...], ...] = (
            (bm, 64, 128, 4, 4),
            (bm, 128, 128, 4, 3),
            (bm, 32, 128, 4, 5),
        )
    else:
        shapes = ((128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (64, 128, 128, 4, 3),
                  (128, 128, 64, 8, 3), (64, 64, 128, 4, 3))  # fmt: skip
    return [tile(w, s, BM=m, BN=n, BK=k) for m, n, k, w, s in shapes]
