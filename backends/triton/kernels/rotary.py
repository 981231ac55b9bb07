"""Rotary position embedding, both pairings; its backward is the rotation by minus the angle."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import next_power_of_2
from mopt.backends.triton.launch import Launch, Runner


@triton.jit(do_not_specialize=["queries"])
def rotary(
    x, cos, sin, out, queries, heads, half, sign, x_batch, x_head, x_token, angle_token,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    keep = pair < half
    c = tl.load(cos + token * angle_token + pair, mask=keep, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * angle_token + pair, mask=keep, other=0.0).to(tl.float32)[None, :]
    s = s * sign
    base = x + batch * x_batch + token * x_token + head[:, None].to(tl.int64) * x_head
    # Outputs lie (batch, token, head, width).
    goal = out + ((batch * queries + token) * heads + head[:, None]) * (2 * half)
    if INTERLEAVED:
        first = 2 * pair[None, :]
        second = first + 1
    else:
        first = pair[None, :]
        second = first + half
    mask = (head < heads)[:, None] & keep[None, :]
    a = tl.load(base + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + second, mask=mask, other=0.0).to(tl.float32)
    tl.store(goal + first, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(goal + second, (b * c + a * s).to(out.dtype.element_ty), mask=mask)


def call(
    run: Runner, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False,
    backward: bool = False,
) -> Tensor:  # fmt: skip
    """``x`` (tokens, heads, width), or (batch, heads, tokens, width), rotated token by token.

    ``cos`` and ``sin`` (tokens, at least width / 2): the first half of a row is read. Pairs are
    (i, i + width / 2), or (2i, 2i + 1) where ``interleaved``. ``backward`` turns a gradient of the
    result into one of ``x``. Tensors may be views whose last axis is contiguous.
    """
    wide = x if x.dim() == 4 else x.transpose(0, 1).unsqueeze(0)
    batch, heads, tokens, width = wide.shape
    out = torch.empty((batch, tokens, heads, width), dtype=x.dtype, device=x.device)
    if out.numel():
        sizes = {"HEADS": next_power_of_2(heads), "HALF": next_power_of_2(width // 2)}
        run(
            Launch(
                rotary, (tokens, batch),
                {"x": x, "cos": cos, "sin": sin, "out": out, "queries": tokens, "heads": heads,
                 "half": width // 2, "sign": -1.0 if backward else 1.0, "x_batch": wide.stride(0),
                 "x_head": wide.stride(1), "x_token": wide.stride(2),
                 "angle_token": cos.stride(0)},
                {"INTERLEAVED": interleaved, **sizes}, ("out",), 4, 2,
            )
        )  # fmt: skip
    return out.transpose(1, 2) if x.dim() == 4 else out[0]


def reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """The same in torch."""
    c, s = cos[:, None], sin[:, None]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1)
