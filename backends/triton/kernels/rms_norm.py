"""RMS norm with backward; optionally of a sum with a residual, which is written too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import next_power_of_2
from mopt.backends.triton.launch import Launch, Runner

WIDEST = 16_384
# Programs of the backward pass: each adds up the weight gradient of its share of the rows.
PARTS = 264


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward(
    x, residual, weight, out, total, rstd, rows, width, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(x + row * width + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * width + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + row * width + at, value.to(total.dtype.element_ty), mask=mask)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    gain = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    result = value * factor * gain
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=mask)
    tl.store(rstd + row, factor)


@triton.jit(do_not_specialize=["rows", "share"])
def rms_norm_backward(
    grad, x, weight, rstd, dx, partial, rows, width, share,
    BLOCK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """A share of the rows: their input gradients, and their part of the weight's."""
    part = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < width
    gain = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    first = part * share
    for index in range(first, tl.minimum(first + share, rows)):
        row = tl.cast(index, tl.int64)
        value = tl.load(x + row * width + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + row * width + at, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(rstd + row)
        normal = value * factor
        scaled = g * gain
        mean = tl.sum(scaled * normal, axis=0) / width
        result = factor * (scaled - normal * mean)
        tl.store(dx + row * width + at, result.to(dx.dtype.element_ty), mask=mask)
        sums += g * normal
    tl.store(partial + part.to(tl.int64) * width + at, sums, mask=mask)


def forward(
    run: Runner, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm of ``x + residual``, that sum, fp32 reciprocal root of each row's mean square)."""
    rows, width = x.shape
    assert width <= WIDEST
    out, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    total = x if residual is None else torch.empty_like(x)
    if rows:
        block = next_power_of_2(width)
        run(
            Launch(
                rms_norm_forward, (rows,),
                {"x": x, "residual": x if residual is None else residual, "weight": weight,
                 "out": out, "total": out if residual is None else total, "rstd": rstd,
                 "rows": rows, "width": width, "eps": float(eps)},
                {"HAS_RESIDUAL": residual is not None, "BLOCK": block},
                ("out", "total", "rstd"), max(1, min(16, block // 512)), 2,
            )
        )  # fmt: skip
    return out, total, rstd


def backward(
    run: Runner, grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the (summed) input and of the weight."""
    rows, width = x.shape
    dx = torch.empty_like(x)
    parts = max(1, min(PARTS, rows))
    partial = torch.zeros(parts, width, dtype=torch.float32, device=x.device)
    if rows:
        block = next_power_of_2(width)
        run(
            Launch(
                rms_norm_backward, (parts,),
                {"grad": grad, "x": x, "weight": weight, "rstd": rstd, "dx": dx,
                 "partial": partial, "rows": rows, "width": width, "share": -(-rows // parts)},
                {"BLOCK": block}, ("dx", "partial"), max(1, min(16, block // 512)), 2,
            )
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in torch, differentiable."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
