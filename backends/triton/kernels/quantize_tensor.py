"""Rounds a whole tensor to 8 bits by its own range: two launches, no synchronization."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernels._numbers import round_even
from mopt.backends.triton.launch import Launch, Runner
from mopt.ops import dynamic_uint8

_BLOCK = 1024
_MOST_PARTS = 512


@triton.jit(do_not_specialize=["share"])
def range_of(x, low, high, count, share, BLOCK: tl.constexpr, ARCH: tl.constexpr):
    """The least and largest value of each program's share, and 0."""
    part = tl.program_id(0)
    least = tl.zeros((BLOCK,), dtype=tl.float32)
    most = tl.zeros((BLOCK,), dtype=tl.float32)
    first = part.to(tl.int64) * share
    for start in range(0, share, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=(at < count) & (at < first + share), other=0.0).to(tl.float32)
        least = tl.minimum(least, value)
        most = tl.maximum(most, value)
    tl.store(low + part, tl.min(least, axis=0))
    tl.store(high + part, tl.max(most, axis=0))


@triton.jit(do_not_specialize=["parts"])
def quantize_tensor(
    x, low, high, codes, scale, zero, count, parts,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Codes less 128 as int8, by the range that all programs together found."""
    each = tl.arange(0, PARTS)
    least = tl.min(tl.load(low + each, mask=each < parts, other=0.0), axis=0)
    most = tl.max(tl.load(high + each, mask=each < parts, other=0.0), axis=0)
    step = (most - least) / 255.0
    safe = tl.where(step > 0.0, step, 1.0)
    offset = round_even(tl.minimum(tl.maximum(-least / safe, 0.0), 255.0))
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    # Values lie within the range, so that the quotient is below 2**9.
    code = round_even(value / safe) + offset
    code = tl.minimum(tl.maximum(code, 0.0), 255.0) - 128.0
    tl.store(codes + at, code.to(tl.int8), mask=at < count)
    if tl.program_id(0) == 0:
        tl.store(scale, step)
        tl.store(zero, (offset - 128.0).to(tl.int32))


def call(run: Runner, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes shaped as contiguous ``x``, fp32 scale (1), int32 zero point (1).

    ``scale * (codes - zero)`` is what ``mopt::linear_dynamic_int8`` computes with.
    """
    count = x.numel()
    parts = max(1, min(_MOST_PARTS, -(-count // (4 * _BLOCK))))
    share = -(-count // parts)
    low = torch.empty(parts, dtype=torch.float32, device=x.device)
    high, codes = torch.empty_like(low), torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty(1, dtype=torch.float32, device=x.device)
    zero = torch.empty(1, dtype=torch.int32, device=x.device)
    run(
        Launch(
            range_of, (parts,), {"x": x, "low": low, "high": high, "count": count, "share": share},
            {"BLOCK": _BLOCK}, ("low", "high"), 4, 2,
        )
    )  # fmt: skip
    run(
        Launch(
            quantize_tensor, (max(1, -(-count // _BLOCK)),),
            {"x": x, "low": low, "high": high, "codes": codes, "scale": scale, "zero": zero,
             "count": count, "parts": parts},
            {"PARTS": _MOST_PARTS, "BLOCK": _BLOCK}, ("codes", "scale", "zero"), 4, 2,
        )
    )  # fmt: skip
    return codes, scale, zero


def reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator computes, in the same terms."""
    codes, scale, zero = dynamic_uint8(x.float())
    moved = (codes.to(torch.int16) - 128).to(torch.int8)
    return moved, scale.reshape(1), zero.to(torch.int32).reshape(1) - 128
