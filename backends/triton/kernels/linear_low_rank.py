"""Low-rank linear ``(x @ inner.T) @ outer.T + bias`` whose middle stays in registers.

A block computes the middle of its rows once and goes over its share of the outputs with it. That
pays where there are enough rows to fill the chip; a few rows are better served by two products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import Amount, Problem, compute_type, next_power_of_2
from mopt.backends.triton.launch import Launch, Runner, Tile, tile

LARGEST_RANK = 256


@triton.jit(do_not_specialize=["rows"])
def linear_low_rank(
    x, inner, outer, bias, out, rows, outputs, columns, rank, share,
    CT: tl.constexpr, HAS_BIAS: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Some rows and a share of the outputs."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    keep = m < rows
    row = m.to(tl.int64)
    r = tl.arange(0, R)
    known = r < rank
    middle = tl.zeros((BM, R), dtype=tl.float32)
    for k in range(0, columns, BK):
        at = k + tl.arange(0, BK)
        have = at < columns
        a = tl.load(x + row[:, None] * columns + at[None, :], mask=keep[:, None] & have[None, :],
                    other=0.0)  # fmt: skip
        v = tl.load(inner + r[None, :] * columns + at[:, None],
                    mask=known[None, :] & have[:, None], other=0.0)  # fmt: skip
        middle = tl.dot(a.to(CT), v.to(CT), middle, input_precision="tf32")
    left = middle.to(CT)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, outputs), BN):
        n = start + tl.arange(0, BN)
        valid = n < outputs
        u = tl.load(outer + n[None, :] * rank + r[:, None],
                    mask=valid[None, :] & known[:, None], other=0.0)  # fmt: skip
        value = tl.dot(left, u.to(CT), input_precision="tf32")
        if HAS_BIAS:
            value += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)[None, :]
        tl.store(out + row[:, None] * outputs + n[None, :], value.to(out.dtype.element_ty),
                 mask=keep[:, None] & valid[None, :])  # fmt: skip


def call(
    run: Runner, config: Tile, x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor | None
) -> Tensor:
    """``x`` (rows, K), ``inner`` (rank, K), ``outer`` (N, rank), all contiguous."""
    rows, columns = x.shape
    outputs, rank = outer.shape
    out = x.new_empty((rows, outputs))
    if not out.numel():
        return out
    splits = config["SPLIT"]
    share = -(-outputs // (splits * config["BN"])) * config["BN"]
    run(
        Launch(
            linear_low_rank, (-(-rows // config["BM"]), -(-outputs // share)),
            {"x": x, "inner": inner, "outer": outer, "bias": x if bias is None else bias,
             "out": out, "rows": rows, "outputs": outputs, "columns": columns, "rank": rank,
             "share": share},
            {"CT": compute_type(x.dtype), "HAS_BIAS": bias is not None,
             "R": max(16, next_power_of_2(rank)),
             "BM": config["BM"], "BN": config["BN"], "BK": config["BK"]},
            ("out",), config.warps, config.stages,
        )
    )  # fmt: skip
    return out


def reference(x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor | None) -> Tensor:
    """The same in torch."""
    return torch.nn.functional.linear(x @ inner.t(), outer, bias)


def legal(config: Tile, problem: Problem) -> str | None:
    """Why a tile cannot compute a problem, or None."""
    if problem["rank"] > LARGEST_RANK:
        return (
            f"the middle of rank {problem['rank']} does not fit registers, at most {LARGEST_RANK}"
        )
    if problem["rank"] > 128 and config["BM"] > 64:
        return "a large rank leaves registers for 64 rows"
    return None


def work(problem: Problem) -> Amount:
    """Operations and bytes of both products."""
    rows, outputs, columns = problem["rows"], problem["outputs"], problem["columns"]
    rank, size = problem["rank"], problem["itemsize"]
    return Amount(
        2.0 * rows * rank * (outputs + columns), size * rank * (outputs + columns),
        size * rows * (outputs + columns),
    )  # fmt: skip


def space(problem: Problem) -> list[Tile]:
    """Tiles worth trying for so many rows."""
    bm = 16 if problem["rows"] <= 16 else 64
    return [
        tile(w, s, BM=m, BN=n, BK=k, SPLIT=split)
        for m, n, k, w, s in ((bm, 64, 64, 4, 3), (bm, 128, 64, 4, 3), (bm, 64, 32, 4, 3),
                              (bm, 64, 64, 8, 2))
        for split in (1, 4, 16)
    ]  # fmt: skip
