"""A norm and the rounding of its rows to 8 bits in one pass: the input of an 8-bit linear.

RMS norm, or layer norm where ``centered``. Rows get scales of their own, or all of them one that is
known beforehand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import next_power_of_2
from mopt.backends.triton.kernels._numbers import limit_of, quantized, round_even
from mopt.backends.triton.launch import Launch, Runner

WIDEST = 16_384


@triton.jit(do_not_specialize=["rows"])
def norm_quantize(
    x, weight, bias, zero, codes, scale, rows, width, eps,
    KIND: tl.constexpr, STATIC: tl.constexpr, CENTERED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One row: norm, largest magnitude unless the scale is known, codes."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(x + row * width + at, mask=mask, other=0.0).to(tl.float32)
    if CENTERED:
        value = tl.where(mask, value - tl.sum(value, axis=0) / width, 0.0)
    value *= 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    if HAS_WEIGHT:
        value *= tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    if STATIC:
        # Codes are 255 apart at most: what is far outside may be cut before it is rounded.
        ratio = tl.minimum(tl.maximum(value / tl.load(scale), -768.0), 768.0)
        code = round_even(ratio) + tl.load(zero).to(tl.float32)
        if KIND == "uint8":
            code = tl.minimum(tl.maximum(code, 0.0), 255.0).to(tl.int32).to(tl.uint8)
        else:
            code = tl.minimum(tl.maximum(code, -128.0), 127.0).to(tl.int8)
        tl.store(codes + row * width + at, code, mask=mask)
    else:
        step = tl.max(tl.abs(value), axis=0) / limit_of(KIND)
        safe = tl.where(step > 0.0, step, 1.0)
        tl.store(codes + row * width + at, quantized(value / safe, KIND, ARCH), mask=mask)
        tl.store(scale + row, safe)


def call(
    run: Runner, x: Tensor, weight: Tensor | None, eps: float, kind: str = "int8", *,
    bias: Tensor | None = None, centered: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes int8 (rows, width), the bits of floats where ``kind`` is "e4m3"; fp32 scales (rows).

    A row of zeros has zero codes and scale 1.
    """
    codes = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch(run, x, weight, bias, scale, scale, codes, eps, kind, centered, ("codes", "scale"))
    return codes, scale


def call_static(
    run: Runner, x: Tensor, weight: Tensor | None, eps: float, scale: Tensor, zero: Tensor, *,
    bias: Tensor | None = None, centered: bool = False,
) -> Tensor:  # fmt: skip
    """Codes (rows, width) in the type of ``zero``, uint8 or int8, as ``mopt::quantize`` has them.

    ``scale`` fp32 and ``zero`` are single numbers.
    """
    codes = torch.empty_like(x, dtype=zero.dtype)
    kind = "uint8" if zero.dtype == torch.uint8 else "int8"
    _launch(run, x, weight, bias, zero, scale, codes, eps, kind, centered, ("codes",))
    return codes


def _launch(
    run: Runner, x: Tensor, weight: Tensor | None, bias: Tensor | None, zero: Tensor, scale: Tensor,
    codes: Tensor, eps: float, kind: str, centered: bool, outputs: tuple[str, ...],
) -> None:  # fmt: skip
    rows, width = x.shape
    assert width <= WIDEST
    if not rows:
        return
    block = next_power_of_2(width)
    run(
        Launch(
            norm_quantize, (rows,),
            {"x": x, "weight": x if weight is None else weight, "bias": x if bias is None else bias,
             "zero": zero, "codes": codes, "scale": scale, "rows": rows, "width": width,
             "eps": float(eps)},
            {"KIND": kind, "STATIC": outputs == ("codes",), "CENTERED": centered,
             "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "BLOCK": block},
            outputs, max(1, min(16, block // 512)), 2,
        )
    )  # fmt: skip


def normed(
    x: Tensor, weight: Tensor | None, eps: float, *, bias: Tensor | None = None,
    centered: bool = False,
) -> Tensor:  # fmt: skip
    """The norm itself in torch, in the type of ``x``."""
    value = x - x.mean(-1, keepdim=True) if centered else x
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        value = value * weight.to(value.dtype)
    return value if bias is None else value + bias.to(value.dtype)


def reference(
    x: Tensor, weight: Tensor | None, eps: float, kind: str = "int8", *,
    bias: Tensor | None = None, centered: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in torch."""
    value = normed(x.float(), weight, eps, bias=bias, centered=centered)
    step = value.abs().amax(-1) / (127 if kind == "int8" else 448)
    safe = torch.where(step > 0, step, torch.ones_like(step))
    ratio = value / safe[:, None]
    if kind == "int8":
        return ratio.round().clamp(-127, 127).to(torch.int8), safe
    return ratio.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.int8), safe
