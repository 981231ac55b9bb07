"""Rotary position embedding, both pairings; its backward is the rotation by minus the angle."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import next_power_of_2
from mopt.backends.triton.launch import Launch, Runner


@triton.jit(do_not_specialize=["rows"])
def rotary(
    x, cos, sin, out, rows, heads, half, sign,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    keep = pair < half
    c = tl.load(cos + row * half + pair, mask=keep, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * half + pair, mask=keep, other=0.0).to(tl.float32)[None, :] * sign
    base = (row * heads + head[:, None]) * (2 * half)
    if INTERLEAVED:
        first = base + 2 * pair[None, :]
        second = first + 1
    else:
        first = base + pair[None, :]
        second = first + half
    mask = (head < heads)[:, None] & keep[None, :]
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + second, (b * c + a * s).to(out.dtype.element_ty), mask=mask)


def call(
    run: Runner, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False,
    backward: bool = False,
) -> Tensor:  # fmt: skip
    """``x`` (tokens, heads, width) rotated by ``cos`` and ``sin`` (tokens, width / 2).

    Pairs are (i, i + width / 2), or (2i, 2i + 1) where ``interleaved``. ``backward`` turns a
    gradient of the result into one of ``x``.
    """
    rows, heads, width = x.shape
    out = torch.empty_like(x)
    if rows:
        sizes = {"HEADS": next_power_of_2(heads), "HALF": next_power_of_2(width // 2)}
        run(
            Launch(
                rotary, (rows,),
                {"x": x, "cos": cos, "sin": sin, "out": out, "rows": rows, "heads": heads,
                 "half": width // 2, "sign": -1.0 if backward else 1.0},
                {"INTERLEAVED": interleaved, **sizes}, ("out",), 4, 2,
            )
        )  # fmt: skip
    return out


def reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """The same in torch."""
    c, s = cos[:, None], sin[:, None]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1)
