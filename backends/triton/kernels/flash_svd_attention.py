"""Attention over low-rank keys and values, which are never made: the exact absorbed form.

With keys ``pk @ vk`` and values ``pv @ vv`` (no rotary embedding between) scores are
``(q @ vk.T) @ pk.T``, and outputs ``(weights @ pv) @ vv``: attention of the width of the ranks
between two small products, after Shao et al. 2025, "FlashSVD". The queries are low-rank too:
``q = pq @ vq``, of which only a tile exists at a time. The first factors may be one for all heads,
as factorizing a whole layer leaves them: then their stride over heads is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import Amount, Problem, compute_type, next_power_of_2
from mopt.backends.triton.launch import Launch, Runner, Tile, tile

_LOG2_E = 1.4426950408889634
DEFAULT = tile(4, 2, BM=64, BN=64)
LARGEST_RANK = 128


@triton.jit
def _matrix(base, rows, columns, R: tl.constexpr, C: tl.constexpr):
    """A small matrix (rows, columns) in registers, zeros around it."""
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    return tl.load(base + r[:, None] * columns + c[None, :],
                   mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)  # fmt: skip


@triton.jit(do_not_specialize=["queries", "keys", "offset", "m_batch"])
def flash_svd_attention(
    pq, vq, pk, vk, pv, vv, bias, v_bias, mask, out, scale,
    heads, queries, keys, width, rank_q, rank_k, rank_v, offset,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, m_batch,
    HAS_BIAS: tl.constexpr, HAS_V_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, CT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Some queries of one head."""
    pair = tl.program_id(1).to(tl.int64)
    head = pair % heads
    batch = pair // heads
    q_base = pq + batch * q_batch + head * q_head
    k_base = pk + batch * k_batch + head * k_head
    v_base = pv + batch * v_batch + head * v_head
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    keep = m < queries
    r = tl.arange(0, RQ)
    left = tl.load(q_base + m[:, None].to(tl.int64) * q_token + r[None, :],
                   mask=keep[:, None] & (r < rank_q)[None, :], other=0.0)  # fmt: skip
    up = _matrix(vq + head * rank_q * width, rank_q, width, RQ, D)
    query = tl.dot(left.to(CT), up.to(CT), input_precision="tf32")
    if HAS_BIAS:
        # Biases of queries alone: those of keys do not change weights, of values go to the output.
        d = tl.arange(0, D)
        query += tl.load(bias + head * width + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    down = _matrix(vk + head * rank_k * width, rank_k, width, RK, D)
    absorbed = tl.dot(query.to(CT), tl.trans(down.to(CT)), input_precision="tf32")
    absorbed = (absorbed * scale).to(CT)
    best = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    acc = tl.zeros((BM, RV), dtype=tl.float32)
    k_at = tl.arange(0, RK)
    v_at = tl.arange(0, RV)
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, tl.program_id(0) * BM + BM + offset)
    for start in range(0, last, BN):
        key = start + tl.arange(0, BN)
        valid = key < keys
        inner = tl.load(k_base + key[None, :].to(tl.int64) * k_token + k_at[:, None],
                        mask=valid[None, :] & (k_at < rank_k)[:, None], other=0.0)  # fmt: skip
        score = tl.dot(absorbed, inner.to(CT), input_precision="tf32")
        seen = valid[None, :] & keep[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= (m + offset)[:, None])
        if HAS_MASK:
            read = tl.load(mask + batch * m_batch + key, mask=valid, other=0)
            seen = seen & (read != 0)[None, :]
        score = tl.where(seen, score, float("-inf"))
        most = tl.maximum(best, tl.max(score, axis=1))
        base = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weight, axis=1)
        value = tl.load(v_base + key[:, None].to(tl.int64) * v_token + v_at[None, :],
                        mask=valid[:, None] & (v_at < rank_v)[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(weight.to(CT), value.to(CT), acc * shrink[:, None], input_precision="tf32")
        best = most
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    widen = _matrix(vv + head * rank_v * width, rank_v, width, RV, D)
    result = tl.dot(acc.to(CT), widen.to(CT), input_precision="tf32")
    d = tl.arange(0, D)
    if HAS_V_BIAS:
        # Weights sum to 1, so that the bias of values comes out as it is; to rows that see nothing
        # none does.
        shift = tl.load(v_bias + head * width + d, mask=d < width, other=0.0).to(tl.float32)
        result += tl.where(total > 0.0, 1.0, 0.0)[:, None] * shift[None, :]
    tl.store(out + (pair * queries + m[:, None]) * width + d[None, :],
             result.to(out.dtype.element_ty),
             mask=keep[:, None] & (d < width)[None, :])  # fmt: skip


def call(
    run: Runner, q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], *,
    bias: Tensor | None = None, v_bias: Tensor | None = None, causal: bool = False,
    scale: float | None = None, offset: int | None = None, mask: Tensor | None = None,
    config: Tile = DEFAULT,
) -> Tensor:  # fmt: skip
    """Outputs (batch, heads, queries, width).

    Each of ``q``, ``k`` and ``v`` is a pair: what the first factor gave, (batch, heads, tokens,
    rank) with a contiguous last axis, and the second factor, (heads, rank, width). ``bias`` (heads,
    width) is added to queries, ``v_bias`` to values. Causal: query ``i`` sees keys up to
    ``i + offset``, where it is not given so that the last sees all. ``mask`` (batch, 1, 1, keys) is
    True where a key is seen.
    """
    (pq, vq), (pk, vk), (pv, vv) = q, k, v
    batch, heads, queries, rank_q = pq.shape
    width, rank_k, rank_v = vq.shape[2], pk.shape[3], pv.shape[3]
    assert max(rank_q, rank_k, rank_v) <= LARGEST_RANK
    out = pq.new_empty((batch, heads, queries, width))
    keys = pk.shape[2]
    seen, m_batch = pq, 0
    if mask is not None:
        seen = mask.expand(batch, 1, 1, keys)
        seen = seen if keys == 1 or seen.stride(3) == 1 else seen.contiguous()
        seen, m_batch = seen.view(torch.uint8), seen.stride(0)
    if out.numel():
        sizes = {"D": width, "RQ": rank_q, "RK": rank_k, "RV": rank_v}
        run(
            Launch(
                flash_svd_attention, (-(-queries // config["BM"]), batch * heads),
                {"pq": pq, "vq": vq, "pk": pk, "vk": vk, "pv": pv, "vv": vv,
                 "bias": pq if bias is None else bias,
                 "v_bias": pq if v_bias is None else v_bias, "mask": seen, "out": out,
                 "scale": float((width**-0.5 if scale is None else scale) * _LOG2_E),
                 "heads": heads, "queries": queries, "keys": keys, "width": width,
                 "rank_q": rank_q, "rank_k": rank_k, "rank_v": rank_v,
                 "offset": keys - queries if offset is None else offset,
                 "q_batch": pq.stride(0), "q_head": pq.stride(1), "q_token": pq.stride(2),
                 "k_batch": pk.stride(0), "k_head": pk.stride(1), "k_token": pk.stride(2),
                 "v_batch": pv.stride(0), "v_head": pv.stride(1), "v_token": pv.stride(2),
                 "m_batch": m_batch},
                {"HAS_BIAS": bias is not None, "HAS_V_BIAS": v_bias is not None,
                 "HAS_MASK": mask is not None, "CAUSAL": causal, "CT": compute_type(pq.dtype),
                 **config.constants,
                 **{name: max(16, next_power_of_2(size)) for name, size in sizes.items()}},
                ("out",), config.warps, config.stages,
            )
        )  # fmt: skip
    return out


def reference(
    q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], *,
    bias: Tensor | None = None, v_bias: Tensor | None = None, causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same with dense queries, keys and values."""
    dense_q, dense_k, dense_v = (p @ factor for p, factor in (q, k, v))
    if bias is not None:
        dense_q = dense_q + bias[:, None]
    if v_bias is not None:
        dense_v = dense_v + v_bias[:, None]
    found: Tensor = torch.nn.functional.scaled_dot_product_attention(
        dense_q, dense_k, dense_v, attn_mask=mask, is_causal=causal
    )
    return found


def legal(config: Tile, problem: Problem) -> str | None:
    """Why a tile cannot compute a problem, or None."""
    rank = max(problem[name] for name in ("rank_q", "rank_k", "rank_v"))
    if rank > LARGEST_RANK:
        return f"rank {rank} does not fit registers, which hold up to {LARGEST_RANK}"
    return None


def grid(config: Tile, problem: Problem) -> tuple[int, int, int]:
    """Blocks of queries, and of heads."""
    return -(-problem["rows"] // config["BM"]), problem["batch"] * problem["heads"], 1


def work(problem: Problem) -> Amount:
    """Operations and bytes; ``rows`` are the queries of one head."""
    heads, rows, keys = problem["batch"] * problem["heads"], problem["rows"], problem["keys"]
    width, inner = problem["width"], problem["rank_k"] + problem["rank_v"]
    seen = 0.5 if problem["causal"] else 1.0
    small = rows * width * (problem["rank_q"] + inner)
    size = problem["itemsize"]
    return Amount(
        2.0 * heads * (rows * keys * inner * seen + small),
        1.0 * problem["batch"] * keys * inner * size,
        1.0 * heads * rows * (width + problem["rank_q"]) * size,
    )


def space(problem: Problem) -> list[Tile]:
    """Tiles worth trying."""
    shapes = ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2))
    return [tile(w, s, BM=m, BN=n) for m, n, w, s in shapes]
