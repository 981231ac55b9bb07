"""Every Triton kernel against float64, on fresh random data and memory full of NaN.

Used by ``benchmarks/triton_gpu.py``: first on a GPU, or in Triton's interpreter with small sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopt.backends.triton.catalogue import GROUPS
from mopt.backends.triton.kernels import (
    cut_cross_entropy,
    flash_attention,
    flash_svd_attention,
    flash_svd_ffn,
    linear_bytes,
    linear_codes,
    linear_low_rank,
    norm_quantize,
    quantize_tensor,
    rms_norm,
    rotary,
    saved_activations,
    swiglu,
)
from mopt.backends.triton.kernels.linear_codes import BITS, PackedWeight
from mopt.backends.triton.launch import Runner, tile
from mopt.backends.triton.planes import PADDED, pack_planes
from mopt.levels import levels

MIDDLE = {"int8": 128, "int4": 8, "int3": 4, "int2": 2}


@dataclass(frozen=True)
class Setting:
    """Where and how large: ``size`` is the width of layers, ``run`` who runs launches."""

    run: Runner
    device: str
    size: int
    dtype: torch.dtype

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Fresh normal values in the setting's type."""
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)


def random_weight(kind: str, outputs: int, columns: int, device: str, dtype: torch.dtype,
                  group: int | None = None) -> tuple[PackedWeight, Tensor]:  # fmt: skip
    """A packed weight of random codes, and in float64 what it stands for."""
    group = GROUPS.get(kind, 128) if group is None else group
    unit, bits = group or 128, BITS[kind]
    padded = -(-outputs // PADDED) * PADDED
    codes = torch.randint(0, 2**bits, (padded, columns), device=device)
    groups = columns // group if group else 1
    scales = (torch.rand(groups, padded, device=device) + 0.5).to(dtype) * columns**-0.5
    extra = None
    if kind in MIDDLE:
        values = codes.double() - MIDDLE[kind]
        stored = (codes - 128) & 255 if kind == "int8" else codes
    else:
        # Codes of NaN and infinity are never written to a model.
        bad = {"e4m3": 127, "e5m2": 124}.get(kind, 256)
        codes = torch.where((codes & 127) >= bad, torch.zeros_like(codes), codes)
        values, stored = levels(kind).tables[0].to(device).double()[codes], codes
        if kind == "bitmod4":
            extra = torch.full_like(scales, 10.0)
    packed, top = pack_planes(stored, bits, unit)
    steps = scales.double().t().repeat_interleave(group or columns, 1)
    weight = PackedWeight(kind, outputs, columns, group, unit, packed, scales, extra=extra, top=top)
    return weight, (values * steps)[:outputs]


def poison(device: str) -> None:
    """Fill memory that the next allocations get with NaN, so that nothing unwritten looks right."""
    if device == "cuda":
        blocks = [torch.full((1 << n,), math.nan, device=device) for n in range(10, 27)]
        del blocks


def checks(at: Setting) -> Iterator[tuple[str, Callable[[], tuple[Tensor, Tensor]], float]]:
    """(name, a function that gives what was computed and what is right, largest relative error)."""
    rough = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}[at.dtype]
    exact = at.device == "cpu" and at.dtype == torch.float32
    limit = 2e-5 if exact else rough
    for kind in BITS:
        for rows, split in ((1, 2), (5, 1), (at.size // 2 + 3, 1)):
            yield f"linear-codes {kind}, {rows} rows", _codes(at, kind, rows, split), limit
    for kind in ("int8", "e4m3"):
        yield f"linear-bytes {kind}", _bytes(at, kind), limit
    yield "quantize-tensor", _tensor(at), 1e-2
    yield "norm-quantize", _norm_quantize(at), 2e-2
    yield "linear-low-rank", _low_rank(at), 2 * limit
    for causal, queries in ((False, at.size // 2), (True, at.size // 2 + 5), (False, 1)):
        yield f"flash-attention causal={causal} T={queries}", _attention(at, causal, queries), limit
    for kind in ("int8", "e4m3"):
        yield f"flash-attention {kind} cache", _cache(at, kind), limit
    yield "rms-norm", _rms_norm(at), limit
    yield "rms-norm backward", _rms_norm_backward(at), 2 * limit
    yield "rotary", _rotary(at), limit
    yield "swiglu backward", _swiglu(at), limit
    for kind in saved_activations.KINDS:
        yield f"saved-activations {kind}", _saved(at, kind), max(limit, 1e-2)
    yield "cut-cross-entropy", _entropy(at), limit
    yield "cut-cross-entropy backward", _entropy_backward(at), 2 * rough if not exact else limit
    yield "flash-svd attention", _svd_attention(at), 2 * limit
    yield "flash-svd ffn", _svd_ffn(at), 2 * limit


Check = Callable[[], tuple[Tensor, Tensor]]


def _codes(at: Setting, kind: str, rows: int, split: int) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        columns = 2 * max(at.size, 128)
        weight, values = random_weight(kind, at.size + 5, columns, at.device, at.dtype)
        if kind == "bitmod4":  # the sixteenth code is the group's own value, 10 here
            scale = weight.scales.double().t().repeat_interleave(weight.group, 1)[: at.size + 5]
            values = torch.where(values == levels("bitmod4").tables[0][15].item() * scale,
                                 10.0 * scale, values)  # fmt: skip
        x = at.randn(rows, columns)
        counters = torch.zeros(
            linear_codes.counters_needed(weight), dtype=torch.int32, device=at.device
        )
        config = tile(4, 2, BM=16 if rows < 16 else 32, BN=32, SPLIT=split)
        found = linear_codes.call(at.run, config, x, weight, None, counters)
        assert not counters.any()
        return found, x.double() @ values.t()

    return compute


def _bytes(at: Setting, kind: str) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        shapes = ((at.size + 3, 128), (128, 128))
        if kind == "int8":
            a, b = (torch.randint(-127, 128, s, dtype=torch.int8, device=at.device) for s in shapes)
        else:
            a, b = (torch.randn(s, device=at.device).to(torch.float8_e4m3fn).view(torch.uint8)
                    for s in shapes)  # fmt: skip
        left, right = (torch.rand(s[0], device=at.device) for s in shapes)
        config = tile(4, 2, BM=32, BN=32, BK=64)
        found = linear_bytes.call(at.run, config, a, b, left, right, None, 100, dtype=at.dtype)
        return found, linear_bytes.reference(a, b, left, right, None, 100)

    return compute


def _tensor(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        x = at.randn(at.size, 77)
        codes, scale, zero = quantize_tensor.call(at.run, x)
        return (codes.double() - zero) * scale, x.double()

    return compute


def _norm_quantize(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        x, weight = at.randn(7, at.size), at.randn(at.size)
        codes, scale = norm_quantize.call(at.run, x, weight, 1e-5)
        wide = rms_norm.reference(x.double(), weight.double(), 1e-5)
        return codes.double() * scale[:, None], wide

    return compute


def _low_rank(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        x, scale = at.randn(33, at.size), at.size**-0.5
        inner, outer = at.randn(20, at.size, scale=scale), at.randn(at.size + 3, 20)
        config = tile(4, 2, BM=16, BN=32, BK=32, SPLIT=2)
        found = linear_low_rank.call(at.run, config, x, inner, outer, None)
        wide = [value.double() for value in (x, inner, outer)]
        return found, linear_low_rank.reference(wide[0], wide[1], wide[2], None)

    return compute


def _attention(at: Setting, causal: bool, queries: int) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        q = at.randn(2, 4, queries, 64)
        k, v = at.randn(2, 2, at.size, 64), at.randn(2, 2, at.size, 64)
        config = tile(4, 2, BM=16, BN=32, SPLIT=2 if queries == 1 else 1)
        found, _ = flash_attention.call(at.run, config, q, k, v, causal=causal)
        wide = [value.double().cpu() for value in (q, k, v)]
        return found.cpu(), flash_attention.reference(*wide, causal=causal)

    return compute


def _cache(at: Setting, kind: str) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        q = at.randn(2, 4, 1, 64)
        shape, scales = (2, 2, at.size + 3, 64), []
        values, stored = [], []
        for _ in range(2):
            scale = torch.rand(shape[:-1], device=at.device) * 0.01 + 0.01
            if kind == "int8":
                codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=at.device)
                wide = codes.double()
            else:
                small = (torch.randn(shape, device=at.device) * 50).to(torch.float8_e4m3fn)
                codes, wide = small.view(torch.uint8), small.double()
            stored.append(codes)
            scales.append(scale)
            values.append((wide * scale[..., None]).cpu())
        config = tile(4, 2, BM=16, BN=32, SPLIT=2)
        found, _ = flash_attention.call(
            at.run, config, q, *stored, k_scale=scales[0], v_scale=scales[1]
        )
        return found.cpu(), flash_attention.reference(q.double().cpu(), *values)

    return compute


def _rms_norm(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        x, residual, weight = (
            at.randn(9, at.size + 1),
            at.randn(9, at.size + 1),
            at.randn(at.size + 1),
        )
        found, _, _ = rms_norm.forward(at.run, x, weight, 1e-5, residual)
        return found, rms_norm.reference(x.double() + residual.double(), weight.double(), 1e-5)

    return compute


def _gradients(function: Callable[..., Tensor], grad: Tensor, *values: Tensor) -> list[Tensor]:
    wide = [value.double().requires_grad_(True) for value in values]
    return list(torch.autograd.grad(function(*wide), wide, grad.double()))


def _rms_norm_backward(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        x, weight, grad = at.randn(9, at.size), at.randn(at.size), at.randn(9, at.size)
        rstd = rms_norm.forward(at.run, x, weight, 1e-5)[2]
        found = rms_norm.backward(at.run, grad, x, weight, rstd)
        right = _gradients(lambda a, b: rms_norm.reference(a, b, 1e-5), grad, x, weight)
        return _joined(found), _joined(right)

    return compute


def _joined(values: Any) -> Tensor:
    return torch.cat([value.double().reshape(-1) for value in values])


def _rotary(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        x, angle = at.randn(9, 5, 64), torch.randn(9, 32, device=at.device)
        found = rotary.call(at.run, x, angle.cos(), angle.sin())
        return found, rotary.reference(x.double(), angle.double().cos(), angle.double().sin())

    return compute


def _swiglu(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        gate, up, grad = (at.randn(9, at.size) for _ in range(3))
        found = swiglu.backward(at.run, grad, gate, up)
        return _joined(found), _joined(_gradients(swiglu.reference, grad, gate, up))

    return compute


def _saved(at: Setting, kind: str) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        x = at.randn(9, at.size + 1)
        codes, scale = saved_activations.compress(at.run, x, kind)
        return (
            saved_activations.restore(at.run, codes, scale, x, kind),
            saved_activations.reference(x.float(), kind).double(),
        )

    return compute


def _entropy_data(at: Setting) -> tuple[Tensor, Tensor, Tensor]:
    e, c = at.randn(at.size // 2, 48), at.randn(at.size + 9, 48)
    labels = torch.randint(0, c.shape[0], (e.shape[0],), device=at.device)
    labels[1] = cut_cross_entropy.IGNORED
    return e, c, labels


SMALL = tile(4, 2, BT=32, BV=32, BD=16)


def _entropy(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        e, c, labels = _entropy_data(at)
        found, _ = cut_cross_entropy.forward(at.run, e, c, labels, config=SMALL)
        return found, cut_cross_entropy.reference(e.double(), c.double(), labels)

    return compute


def _entropy_backward(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        e, c, labels = _entropy_data(at)
        _, sums = cut_cross_entropy.forward(at.run, e, c, labels, config=SMALL)
        grad = torch.rand(e.shape[0], device=at.device)
        found = cut_cross_entropy.backward(
            at.run, grad, e, c, labels, sums, exact=True, config=SMALL
        )
        right = _gradients(lambda a, b: cut_cross_entropy.reference(a, b, labels), grad, e, c)
        return _joined(found), _joined(right)

    return compute


def _svd_attention(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        pairs = [(at.randn(2, 3, 37, r), at.randn(3, r, 32, scale=r**-0.5)) for r in (16, 24, 16)]
        config = tile(4, 2, BM=16, BN=32)
        found = flash_svd_attention.call(at.run, pairs[0], pairs[1], pairs[2], config=config)
        wide = [(p.double(), v.double()) for p, v in pairs]
        return found, flash_svd_attention.reference(wide[0], wide[1], wide[2])

    return compute


def _svd_ffn(at: Setting) -> Check:
    def compute() -> tuple[Tensor, Tensor]:
        up, down = (at.randn(33, 24), at.randn(24, 100, scale=0.2)), at.randn(100, 20, scale=0.1)
        found = flash_svd_ffn.call(at.run, up, down, config=tile(4, 2, BM=16, BD=32))
        wide = (up[0].double(), up[1].double())
        return found, flash_svd_ffn.reference(wide, down.double())

    return compute


def error_of(found: Tensor, right: Tensor) -> float:
    """The largest difference relative to the largest right value; NaN counts as infinite."""
    gap = (found.double() - right.double()).abs().nan_to_num(math.inf, math.inf, math.inf)
    scale = float(right.abs().max()) if right.numel() else 1.0
    return float(gap.max()) / (scale or 1.0) if gap.numel() else 0.0
