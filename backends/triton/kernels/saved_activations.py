"""Activations kept for the backward pass in 8 bits, 4 bits or 8-bit floats, a scale per group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernels._codes import small_float
from mopt.backends.triton.kernels._numbers import e4m3_bits, round_even
from mopt.backends.triton.launch import Launch, Runner

KINDS = ("int8", "int4", "e4m3")
_LIMITS = {"int8": 127, "int4": 7, "e4m3": 448}
# Groups that one program rounds.
_ROWS = 16


@triton.jit
def _rounded(ratio, seed, at, LIMIT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Integers within the limit: the nearest, or the lower with a drawn number's chance."""
    if STOCHASTIC:
        drawn = tl.rand(seed, at)
        ratio = tl.floor(ratio + drawn)
    else:
        ratio = round_even(ratio)
    return tl.minimum(tl.maximum(ratio, -LIMIT), LIMIT)


@triton.jit(do_not_specialize=["groups", "seed"])
def compress_activations(
    x, codes, scale, groups, count, seed,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, STOCHASTIC: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """Some groups: a scale from the largest magnitude, codes; 4 bits are planar in the group."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = group < groups
    HALF: tl.constexpr = GROUP // 2
    first = group[:, None] * GROUP + tl.arange(0, HALF)[None, :]
    second = first + HALF
    a = tl.load(x + first, mask=keep[:, None] & (first < count), other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=keep[:, None] & (second < count), other=0.0).to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(a), axis=1), tl.max(tl.abs(b), axis=1))
    LIMIT: tl.constexpr = 127.0 if KIND == "int8" else (7.0 if KIND == "int4" else 448.0)
    # The step that is stored is the one that is divided by.
    step = (most / LIMIT).to(scale.dtype.element_ty).to(tl.float32)
    safe = tl.where(step > 0.0, step, 1.0)[:, None]
    if KIND == "e4m3":
        tl.store(codes + first, e4m3_bits(a / safe, ARCH), mask=keep[:, None])
        tl.store(codes + second, e4m3_bits(b / safe, ARCH), mask=keep[:, None])
    else:
        p = _rounded(a / safe, seed, first, LIMIT, STOCHASTIC)
        q = _rounded(b / safe, seed, second, LIMIT, STOCHASTIC)
        if KIND == "int8":
            tl.store(codes + first, p.to(tl.int8), mask=keep[:, None])
            tl.store(codes + second, q.to(tl.int8), mask=keep[:, None])
        else:
            packed = (p.to(tl.int32) + 8) | ((q.to(tl.int32) + 8) << 4)
            at = group[:, None] * HALF + tl.arange(0, HALF)[None, :]
            byte = packed.to(tl.uint8).to(tl.int8, bitcast=True)
            tl.store(codes + at, byte, mask=keep[:, None])
    tl.store(scale + group, step.to(scale.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["groups"])
def restore_activations(
    codes, scale, out, groups, count,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """The inverse."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = group < groups
    HALF: tl.constexpr = GROUP // 2
    first = group[:, None] * GROUP + tl.arange(0, HALF)[None, :]
    second = first + HALF
    step = tl.load(scale + group, mask=keep, other=0.0).to(tl.float32)[:, None]
    if KIND == "int4":
        at = group[:, None] * HALF + tl.arange(0, HALF)[None, :]
        byte = tl.load(codes + at, mask=keep[:, None], other=0).to(tl.int32) & 255
        a = ((byte & 15) - 8).to(tl.float32)
        b = ((byte >> 4) - 8).to(tl.float32)
    else:
        p = tl.load(codes + first, mask=keep[:, None], other=0)
        q = tl.load(codes + second, mask=keep[:, None], other=0)
        if KIND == "int8":
            a = p.to(tl.float32)
            b = q.to(tl.float32)
        else:
            a = small_float(p.to(tl.uint8, bitcast=True), "e4m3", tl.float32)
            b = small_float(q.to(tl.uint8, bitcast=True), "e4m3", tl.float32)
    tl.store(out + first, (a * step).to(out.dtype.element_ty), mask=keep[:, None] & (first < count))
    tl.store(
        out + second, (b * step).to(out.dtype.element_ty), mask=keep[:, None] & (second < count)
    )


def compress(
    run: Runner, x: Tensor, kind: str, group: int = 128, *, seed: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes int8 (groups * group, half of it for 4 bits) and a scale per group of contiguous ``x``.

    With a ``seed`` integers are rounded up or down by chance, right on average; the same seed
    gives the same codes.
    """
    groups = -(-x.numel() // group)
    size = groups * group // (2 if kind == "int4" else 1)
    codes = torch.empty(size, dtype=torch.int8, device=x.device)
    scale = torch.empty(groups, dtype=scale_dtype, device=x.device)
    if groups:
        run(
            Launch(
                compress_activations, (-(-groups // _ROWS),),
                {"x": x, "codes": codes, "scale": scale, "groups": groups, "count": x.numel(),
                 "seed": seed or 0},
                {"KIND": kind, "GROUP": group, "ROWS": _ROWS, "STOCHASTIC": seed is not None},
                ("codes", "scale"), 4, 2,
            )
        )  # fmt: skip
    return codes, scale


def restore(run: Runner, codes: Tensor, scale: Tensor, like: Tensor, kind: str,
            group: int = 128) -> Tensor:  # fmt: skip
    """The activations, shaped and typed as ``like``."""
    out = torch.empty_like(like)
    if out.numel():
        groups = scale.numel()
        run(
            Launch(
                restore_activations, (-(-groups // _ROWS),),
                {"codes": codes, "scale": scale, "out": out, "groups": groups,
                 "count": out.numel()},
                {"KIND": kind, "GROUP": group, "ROWS": _ROWS}, ("out",), 4, 2,
            )
        )  # fmt: skip
    return out


def reference(x: Tensor, kind: str, group: int = 128) -> Tensor:
    """What comes back after rounding to nearest with fp32 scales."""
    count = x.numel()
    flat = torch.nn.functional.pad(x.float().reshape(-1), (0, -count % group)).view(-1, group)
    limit = _LIMITS[kind]
    step = flat.abs().amax(-1, keepdim=True) / limit
    ratio = flat / torch.where(step > 0, step, torch.ones_like(step))
    if kind == "e4m3":
        rounded = ratio.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    else:
        rounded = ratio.round().clamp(-limit, limit)
    return (rounded * step).reshape(-1)[:count].reshape(x.shape).to(x.dtype)
