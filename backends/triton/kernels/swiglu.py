"""``silu(gate) * up`` with backward, which computes the sigmoid again instead of keeping it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernels._numbers import sigmoid
from mopt.backends.triton.launch import Launch, Runner

_BLOCK = 1024


@triton.jit
def swiglu_forward(gate, up, out, count, BLOCK: tl.constexpr, ARCH: tl.constexpr):
    """One block of values, rounded once at the end."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (g * sigmoid(g) * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward(grad, gate, up, dgate, dup, count, BLOCK: tl.constexpr, ARCH: tl.constexpr):
    """One block of both gradients."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(g)
    tl.store(dup + at, (d * g * s).to(dup.dtype.element_ty), mask=mask)
    slope = s * (1.0 + g * (1.0 - s))
    tl.store(dgate + at, (d * u * slope).to(dgate.dtype.element_ty), mask=mask)


def forward(run: Runner, gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` for contiguous tensors of one shape."""
    out, count = torch.empty_like(gate), gate.numel()
    if count:
        run(
            Launch(
                swiglu_forward, (-(-count // _BLOCK),),
                {"gate": gate, "up": up, "out": out, "count": count}, {"BLOCK": _BLOCK},
                ("out",), 4, 2,
            )
        )  # fmt: skip
    return out


def backward(run: Runner, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate`` and ``up``."""
    dgate, dup, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    if count:
        run(
            Launch(
                swiglu_backward, (-(-count // _BLOCK),),
                {"grad": grad, "gate": gate, "up": up, "dgate": dgate, "dup": dup, "count": count},
                {"BLOCK": _BLOCK}, ("dgate", "dup"), 4, 2,
            )
        )  # fmt: skip
    return dgate, dup


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same in torch, differentiable."""
    return torch.nn.functional.silu(gate) * up
