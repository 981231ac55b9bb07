"""A feed-forward block of low-rank layers whose wide middle never reaches memory.

``down(activation(up(x)))``, or ``down(silu(gate(x)) * up(x))``, each layer a product of two
factors. The first factors of up and gate are one small product before, the second factor of down
one after; between them this kernel goes over the wide middle in tiles that stay in registers,
after Shao et al. 2025, "FlashSVD".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import Amount, Problem, compute_type, next_power_of_2
from mopt.backends.triton.kernels._numbers import activated
from mopt.backends.triton.launch import Launch, Runner, Tile, tile

DEFAULT = tile(8, 2, BM=32, BD=32)
LARGEST_RANK = 512


@triton.jit
def _tile_of_middle(p, v, bias, row, keep, d, rank, inner, HAS_BIAS: tl.constexpr,
                    R: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
                    CT: tl.constexpr):  # fmt: skip
    """``p @ v + bias`` for some columns of the middle."""
    have = d < inner
    acc = tl.zeros((BM, BD), dtype=tl.float32)
    for start in tl.static_range(0, R, BR):
        r = start + tl.arange(0, BR)
        a = tl.load(p + row[:, None] * rank + r[None, :],
                    mask=keep[:, None] & (r < rank)[None, :], other=0.0)  # fmt: skip
        b = tl.load(v + r[:, None].to(tl.int64) * inner + d[None, :],
                    mask=(r < rank)[:, None] & have[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(a.to(CT), b.to(CT), acc, input_precision="tf32")
    if HAS_BIAS:
        acc += tl.load(bias + d, mask=have, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["rows"])
def flash_svd_ffn(
    up, up_factor, gate, gate_factor, bias, down, out, rows, inner, rank, rank_out,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, CT: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, R: tl.constexpr, RO: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """Some rows: over all tiles of the middle, sums of width ``rank_out``."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    keep = m < rows
    row = m.to(tl.int64)
    o = tl.arange(0, RO)
    acc = tl.zeros((BM, RO), dtype=tl.float32)
    for start in range(0, inner, BD):
        d = start + tl.arange(0, BD)
        middle = _tile_of_middle(
            up, up_factor, bias, row, keep, d, rank, inner, HAS_BIAS, R, BR, BM, BD, CT
        )
        if GATED:
            turn = _tile_of_middle(
                gate, gate_factor, bias, row, keep, d, rank, inner, False, R, BR, BM, BD, CT
            )
            middle *= activated(turn, ACTIVATION)
        else:
            middle = activated(middle, ACTIVATION)
        middle = tl.where((d < inner)[None, :], middle, 0.0)
        w = tl.load(down + d[:, None].to(tl.int64) * rank_out + o[None, :],
                    mask=(d < inner)[:, None] & (o < rank_out)[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(middle.to(CT), w.to(CT), acc, input_precision="tf32")
    tl.store(out + row[:, None] * rank_out + o[None, :], acc.to(out.dtype.element_ty),
             mask=keep[:, None] & (o < rank_out)[None, :])  # fmt: skip


def call(
    run: Runner, up: tuple[Tensor, Tensor], down: Tensor, *,
    gate: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None,
    activation: str = "gelu", config: Tile = DEFAULT,
) -> Tensor:  # fmt: skip
    """(rows, rank of down): what the second factor of down is to be applied to.

    ``up`` and ``gate`` are pairs (rows, rank) and (rank, inner) of one rank, ``down`` the first
    factor (inner, rank of down), ``bias`` (inner) that of up. Where there is a gate the activation
    is of the gate alone.
    """
    (p, factor), (rows, rank) = up, up[0].shape
    inner, rank_out = down.shape
    assert max(rank, rank_out) <= LARGEST_RANK
    out = p.new_empty((rows, rank_out))
    if rows:
        turn = (p, factor) if gate is None else gate
        size = max(16, next_power_of_2(rank))
        run(
            Launch(
                flash_svd_ffn, (-(-rows // config["BM"]),),
                {"up": p, "up_factor": factor, "gate": turn[0], "gate_factor": turn[1],
                 "bias": p if bias is None else bias, "down": down, "out": out, "rows": rows,
                 "inner": inner, "rank": rank, "rank_out": rank_out},
                {"GATED": gate is not None, "HAS_BIAS": bias is not None,
                 "ACTIVATION": activation, "CT": compute_type(p.dtype), **config.constants,
                 "BR": min(64, size), "R": size, "RO": max(16, next_power_of_2(rank_out))},
                ("out",), config.warps, config.stages,
            )
        )  # fmt: skip
    return out


def reference(
    up: tuple[Tensor, Tensor], down: Tensor, *, gate: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None, activation: str = "gelu",
) -> Tensor:  # fmt: skip
    """The same with the middle in memory."""
    middle = up[0] @ up[1]
    if bias is not None:
        middle = middle + bias
    function = getattr(torch.nn.functional, activation)
    if gate is None:
        found: Tensor = function(middle) @ down
        return found
    found = (function(gate[0] @ gate[1]) * middle) @ down
    return found


def legal(config: Tile, problem: Problem) -> str | None:
    """Why a tile cannot compute a problem, or None."""
    widest = max(problem["rank"], problem["rank_out"])
    if widest > LARGEST_RANK:
        return f"sums of rank {widest} do not fit registers, at most {LARGEST_RANK}"
    if config["BM"] * next_power_of_2(problem["rank_out"]) > 32 * 512:
        return "a large rank leaves registers for 32 rows"
    return None


def grid(config: Tile, problem: Problem) -> tuple[int, int, int]:
    """Blocks of rows; each goes over the whole middle."""
    return -(-problem["rows"] // config["BM"]), 1, 1


def work(problem: Problem) -> Amount:
    """Operations and bytes; every block of rows reads the weights again, from the cache."""
    rows, inner, size = problem["rows"], problem["inner"], problem["itemsize"]
    widths = problem["rank"] * (2 if problem["gated"] else 1) + problem["rank_out"]
    return Amount(2.0 * rows * inner * widths, size * inner * widths, size * rows * widths)


def space(problem: Problem) -> list[Tile]:
    """Tiles worth trying."""
    shapes = ((64, 32, 8, 2), (32, 32, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2), (16, 32, 4, 2))
    return [tile(w, s, BM=m, BD=d) for m, d, w, s in shapes]
