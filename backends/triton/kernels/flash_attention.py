"""Attention without scores in memory: grouped queries, masks, 8-bit caches.

The queries of all heads that share a head of keys are the rows of one block, so that prefill and
decoding are one kernel. For a few queries the keys are split over the chip; a second kernel joins
the parts. Keys and values may be int8 or e4m3 with a scale for every token and head: the key's
multiplies a column of scores, the value's a column of weights. Causal and sliding masks are known
by their numbers, and blocks of keys outside them are not read; any other is read as a tensor.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import Amount, Problem, compute_type, next_power_of_2
from mopt.backends.triton.kernels._codes import small_float
from mopt.backends.triton.launch import Launch, Runner, Tile, tile

_LOG2_E = 1.4426950408889634


@triton.jit
def _stored(raw, KIND: tl.constexpr, CT: tl.constexpr):
    """Keys or values as the product takes them."""
    if KIND == "e4m3":
        return small_float(raw.to(tl.uint8, bitcast=True), "e4m3", CT)
    else:
        return raw.to(CT)


@triton.jit(
    do_not_specialize=["queries", "keys", "share", "offset", "m_batch", "m_head", "m_token"]
)
def flash_attention(
    q, k, v, k_scale, v_scale, mask, out, lse, scale,
    heads, group, queries, keys, width, offset, window, share,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, s_batch, s_head,
    m_batch, m_head, m_token,
    KIND: tl.constexpr, CT: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr,
    MASK: tl.constexpr, SAME: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Some query rows of one head of keys, over a share of the keys."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    part = tl.program_id(2)
    index = tl.program_id(0) * BM + tl.arange(0, BM)
    rows = queries * group
    keep = index < rows
    token = index // group
    q_at = head * group + index % group
    d = tl.arange(0, D)
    inside = d < width
    wanted = keep[:, None]
    if not EVEN:
        wanted = wanted & inside[None, :]
    query = tl.load(
        q + batch * q_batch + q_at[:, None] * q_head + token[:, None].to(tl.int64) * q_token
        + d[None, :], mask=wanted, other=0.0,
    )  # fmt: skip
    m_base = batch * m_batch
    if not SAME:
        m_base += q_at * m_head + token.to(tl.int64) * m_token
    query = (query.to(tl.float32) * scale).to(CT)
    position = token + offset
    first = part * share
    last = tl.minimum(first + share, keys)
    if CAUSAL:
        final = (tl.minimum(tl.program_id(0) * BM + BM, rows) - 1) // group + offset
        last = tl.minimum(last, final + 1)
    if SLIDING:
        start = (tl.program_id(0) * BM) // group + offset - window + 1
        first = tl.maximum(first, (tl.maximum(start, 0) // BN) * BN)
    best = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    acc = tl.zeros((BM, D), dtype=tl.float32)
    k_base = k + batch * k_batch + head * k_head
    v_base = v + batch * v_batch + head * v_head
    s_base = batch * s_batch + head * s_head
    for at in range(first, last, BN):
        key = at + tl.arange(0, BN)
        valid = key < last
        have = valid[None, :]
        if not EVEN:
            have = have & inside[:, None]
        raw = tl.load(k_base + key[None, :].to(tl.int64) * k_token + d[:, None], mask=have,
                      other=0.0 if KIND == "float" else 0)  # fmt: skip
        score = tl.dot(query, _stored(raw, KIND, CT), input_precision="tf32")
        if KIND != "float":
            score *= tl.load(k_scale + s_base + key, mask=valid, other=0.0)[None, :]
        seen = valid[None, :] & keep[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= position[:, None])
        if SLIDING:
            seen = seen & (key[None, :] > position[:, None] - window)
        if MASK != "none":
            if SAME:
                read = tl.load(mask + m_base + key, mask=valid, other=0)[None, :]
            else:
                read = tl.load(mask + m_base[:, None] + key[None, :], mask=seen, other=0)
            if MASK == "bool":
                seen = seen & (read != 0)
            else:
                # Scores are exponents of two: the factor is log2 of e.
                score += read.to(tl.float32) * 1.4426950408889634
        score = tl.where(seen, score, float("-inf"))
        most = tl.maximum(best, tl.max(score, axis=1))
        # A row that has seen nothing yet has no maximum to subtract.
        base = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weight, axis=1)
        if KIND != "float":
            weight *= tl.load(v_scale + s_base + key, mask=valid, other=0.0)[None, :]
        have = valid[:, None]
        if not EVEN:
            have = have & inside[None, :]
        raw = tl.load(v_base + key[:, None].to(tl.int64) * v_token + d[None, :], mask=have,
                      other=0.0 if KIND == "float" else 0)  # fmt: skip
        acc = tl.dot(weight.to(CT), _stored(raw, KIND, CT), acc * shrink[:, None],
                     input_precision="tf32")  # fmt: skip
        best = most
    seen_any = total > 0.0
    acc = acc / tl.where(seen_any, total, 1.0)[:, None]
    level = tl.where(seen_any, best + tl.log2(tl.where(seen_any, total, 1.0)), float("-inf"))
    # Outputs lie (part, batch, head, token, width).
    line = (
        (part * tl.num_programs(1) + pair).to(tl.int64) * group + index % group
    ) * queries + token
    tl.store(lse + line, level, mask=keep)
    wanted = keep[:, None] & inside[None, :]
    tl.store(out + line[:, None] * width + d[None, :], acc.to(out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["rows", "parts"])
def join_attention(
    partial, level, out, lse, rows, width, parts, D: tl.constexpr, ARCH: tl.constexpr
):  # fmt: skip
    """One row of the parts, weighed by what each saw."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    inside = d < width
    best = tl.load(level + row)
    for part in range(1, parts):
        best = tl.maximum(best, tl.load(level + part * rows.to(tl.int64) + row))
    base = tl.where(best == float("-inf"), 0.0, best)
    total = 0.0
    acc = tl.zeros((D,), dtype=tl.float32)
    for part in range(parts):
        line = part * rows.to(tl.int64) + row
        weight = tl.exp2(tl.load(level + line) - base)
        acc += weight * tl.load(partial + line * width + d, mask=inside, other=0.0)
        total += weight
    safe = tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * width + d, (acc / safe).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, tl.where(total > 0.0, base + tl.log2(safe), float("-inf")))


def call(
    run: Runner, config: Tile, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
    window: int | None = None, scale: float | None = None, offset: int | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(outputs (batch, heads, queries, width), log2 of each row's sum of weights, fp32).

    ``k`` and ``v`` (batch, key heads, keys, width) may be views whose last axis is contiguous;
    int8, or e4m3 given as uint8, with fp32 scales (batch, key heads, keys). Causal masks let query
    ``i`` see keys up to ``i + offset``, where it is not given so that the last sees all. A row that
    sees no key is 0. ``mask`` is what ``scaled_dot_product_attention`` takes: True where a key is
    seen, or what is added to a score; its sizes are those of the scores or 1. One that is the same
    for all queries and heads, as for padding, is read once for a block.
    """
    batch, q_heads, queries, width = q.shape
    heads, keys = k.shape[1], k.shape[2]
    group = q_heads // heads
    kind = {torch.int8: "int8", torch.uint8: "e4m3"}.get(k.dtype, "float")
    parts = max(1, min(config["SPLIT"], -(-keys // config["BN"])))
    share = -(-keys // (parts * config["BN"])) * config["BN"]
    parts = max(1, -(-keys // max(share, 1)))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    made, levels = out, lse
    if parts > 1:
        made = torch.empty((parts, *q.shape), dtype=torch.float32, device=q.device)
        levels = torch.empty((parts, *q.shape[:-1]), dtype=torch.float32, device=q.device)
    block = max(16, next_power_of_2(width))
    factor = (width**-0.5 if scale is None else scale) * _LOG2_E
    scales = lse if k_scale is None else k_scale
    seen, m_strides, kind_of_mask = lse, (0, 0, 0), mask_kind(mask)
    if mask is not None:
        wide = mask.expand(batch, q_heads, queries, keys)
        wide = wide if wide.stride(3) == 1 else wide.contiguous()
        m_strides = wide.stride()[:3]
        seen = wide.view(torch.uint8) if wide.dtype == torch.bool else wide
    run(
        Launch(
            flash_attention, (-(-queries * group // config["BM"]), batch * heads, parts),
            {
                "q": q, "k": k, "v": v, "k_scale": scales,
                "v_scale": lse if v_scale is None else v_scale, "mask": seen,
                "out": made, "lse": levels, "scale": float(factor),
                "heads": heads, "group": group, "queries": queries,
                "keys": keys, "width": width, "window": window or 0, "share": share,
                "offset": keys - queries if offset is None else offset,
                "q_batch": q.stride(0), "q_head": q.stride(1), "q_token": q.stride(2),
                "k_batch": k.stride(0), "k_head": k.stride(1), "k_token": k.stride(2),
                "v_batch": v.stride(0), "v_head": v.stride(1), "v_token": v.stride(2),
                "s_batch": scales.stride(0), "s_head": scales.stride(1),
                "m_batch": m_strides[0], "m_head": m_strides[1], "m_token": m_strides[2],
            },
            {"KIND": kind, "CT": compute_type(q.dtype), "CAUSAL": causal,
             "SLIDING": window is not None, "MASK": kind_of_mask[0], "SAME": kind_of_mask[1],
             "EVEN": block == width,
             "BM": config["BM"], "BN": config["BN"], "D": block},
            ("out", "lse"), config.warps, config.stages,
        )
    )  # fmt: skip
    if parts > 1:
        run(
            Launch(
                join_attention, (lse.numel(),),
                {"partial": made, "level": levels, "out": out, "lse": lse, "rows": lse.numel(),
                 "width": width, "parts": parts},
                {"D": block}, ("out", "lse"), 2, 2,
            )
        )  # fmt: skip
    return out, lse


def mask_kind(mask: Tensor | None) -> tuple[str, bool]:
    """What the kernel does with a mask ("none", "bool" or "float"), and if queries share it."""
    if mask is None:
        return "none", False
    kind = "bool" if mask.dtype == torch.bool else "float"
    return kind, all(size == 1 for size in mask.shape[-3:-1])


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None,
    scale: float | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same with scores in memory."""
    group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = q @ wide_k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    position = torch.arange(queries)[:, None] + keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= torch.arange(keys)[None] <= position
    if window is not None:
        seen &= torch.arange(keys)[None] > position - window
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        score = score + mask
    weight = torch.softmax(score.masked_fill(~seen, -math.inf), -1).nan_to_num(0.0)
    return weight @ wide_v


def legal(config: Tile, problem: Problem) -> str | None:
    """Why a tile cannot compute a problem, or None."""
    if problem["width"] > 256:
        return f"heads of {problem['width']} values do not fit registers, at most 256"
    if config["BM"] * config["BN"] > 64 * 64:
        if problem["width"] > 128:
            return "heads of more than 128 values leave room for tiles of 64 x 64"
        if str(dict(problem.facts).get("masked")).startswith("scores"):
            return "a mask of every score leaves room for tiles of 64 x 64"
    return None


def grid(config: Tile, problem: Problem) -> tuple[int, int, int]:
    """Blocks of rows, of heads, and of keys."""
    keys = -(-problem["keys"] // config["BN"])
    blocks = -(-problem["rows"] // config["BM"])
    return blocks, problem["batch"] * problem["heads"], min(config["SPLIT"], keys)


def work(problem: Problem) -> Amount:
    """Operations and bytes; ``rows`` are the queries of all heads that share one of keys."""
    heads = problem["batch"] * problem["heads"]
    rows, keys, width = problem["rows"], problem["keys"], problem["width"]
    share = 0.5 if problem["causal"] else 1.0
    cache = 2.0 * heads * keys * width * problem["keysize"]
    return Amount(
        4.0 * heads * rows * keys * width * share, cache,
        2.0 * heads * rows * width * problem["itemsize"],
    )  # fmt: skip


def space(problem: Problem) -> list[Tile]:
    """Tiles worth trying."""
    if problem["rows"] <= 16:
        return [
            tile(4, s, BM=16, BN=bn, SPLIT=split)
            for bn, s in ((64, 3), (128, 2), (64, 4)) for split in (32, 16, 8, 4, 1)
        ]  # fmt: skip
    shapes = ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2),
              (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2))  # fmt: skip
    return [tile(w, s, BM=m, BN=n, SPLIT=1) for m, n, w, s in shapes]
