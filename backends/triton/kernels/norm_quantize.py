"""RMS norm and rounding of its rows to 8 bits in one pass: the input of an 8-bit linear."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import next_power_of_2
from mopt.backends.triton.kernels._numbers import limit_of, quantized
from mopt.backends.triton.launch import Launch, Runner

WIDEST = 16_384


@triton.jit(do_not_specialize=["rows"])
def norm_quantize(
    x, weight, codes, scale, rows, width, eps,
    KIND: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One row: norm, largest magnitude, codes."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(x + row * width + at, mask=mask, other=0.0).to(tl.float32)
    value *= 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    if HAS_WEIGHT:
        value *= tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    step = tl.max(tl.abs(value), axis=0) / limit_of(KIND)
    safe = tl.where(step > 0.0, step, 1.0)
    tl.store(codes + row * width + at, quantized(value / safe, KIND, ARCH), mask=mask)
    tl.store(scale + row, safe)


def call(
    run: Runner, x: Tensor, weight: Tensor | None, eps: float, kind: str = "int8"
) -> tuple[Tensor, Tensor]:
    """Codes int8 (rows, width), the bits of floats where ``kind`` is "e4m3"; fp32 scales (rows).

    A row of zeros has zero codes and scale 1.
    """
    rows, width = x.shape
    assert width <= WIDEST
    codes = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = next_power_of_2(width)
        run(
            Launch(
                norm_quantize, (rows,),
                {"x": x, "weight": x if weight is None else weight, "codes": codes, "scale": scale,
                 "rows": rows, "width": width, "eps": float(eps)},
                {"KIND": kind, "HAS_WEIGHT": weight is not None, "BLOCK": block},
                ("codes", "scale"), max(1, min(16, block // 512)), 2,
            )
        )  # fmt: skip
    return codes, scale


def reference(
    x: Tensor, weight: Tensor | None, eps: float, kind: str = "int8"
) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    wide = x.float()
    value = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        value = value * weight.float()
    step = value.abs().amax(-1) / (127 if kind == "int8" else 448)
    safe = torch.where(step > 0, step, torch.ones_like(step))
    ratio = value / safe[:, None]
    if kind == "int8":
        return ratio.round().clamp(-127, 127).to(torch.int8), safe
    return ratio.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.int8), safe
