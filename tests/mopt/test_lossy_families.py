"""Lossy families of saved forms: derivatives in four bits, running ranges, two grains of fp8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mopt import derivative_codes, mixed_fp8, running_ranges

GELU, TANH, SILU = "derivative-gelu-none", "derivative-gelu-tanh", "derivative-silu"


def gradient(value: Tensor, form: str) -> Tensor:
    """What autograd says the derivative is."""
    x = value.double().requires_grad_()
    y = F.silu(x) if form == SILU else F.gelu(x, approximate=form.removeprefix("derivative-gelu-"))
    return torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize(("form", "least", "most"), [
    (GELU, -0.1290, 1.1290), (TANH, -0.1290, 1.1290), (SILU, -0.0998, 1.0998),
])  # fmt: skip
def test_codes_hold_the_derivative_without_bias(form: str, least: float, most: float) -> None:
    torch.manual_seed(0)
    low, step = derivative_codes.grid(form)
    assert (low, low + 15 * step) == pytest.approx((least, most), abs=5e-4)
    value = torch.cat((3 * torch.randn(331), torch.tensor([-50.0, 50.0, 0.0, 1.414, -1.414])))
    packed = derivative_codes.encode(value, form)
    assert packed.numel() == derivative_codes.packed_bytes(form, 336) == 168
    exact, total = gradient(value, form), torch.zeros(336, dtype=torch.float64)
    for _ in range(400):
        stand_in = derivative_codes.decode(
            derivative_codes.encode(value, form), form, [336], torch.float64
        )
        found = gradient(stand_in, form)
        assert (found - exact).abs().max() <= step + 1e-6
        total += found / 400
    # A coin between two steps spreads by half a step at most.
    assert (total - exact).abs().max() <= 5 * 0.5 * step / 400**0.5


def test_an_odd_count_of_values_comes_back() -> None:
    found = derivative_codes.decode(
        derivative_codes.encode(torch.full((3, 3), 50.0), SILU), SILU, [3, 3], torch.float32
    )
    assert gradient(found, SILU) == pytest.approx(torch.ones(3, 3).double(), abs=0.08)


def test_running_ranges_follow_the_batches() -> None:
    torch.manual_seed(0)
    form = running_ranges.form_for((2, 4, 8, 16))
    assert form.startswith("int8-running-4x128@")
    assert running_ranges.form_for((64, 24)).startswith("int8-running-8x3@")
    assert running_ranges.form_for((64, 7)).startswith("int8-running-7x1@")
    # Prices are taken on zeros, which must leave no range behind.
    running_ranges.encode(torch.zeros(2, 4, 8, 16), form)
    scale = torch.tensor([1.0, 2.0, 4.0, 0.0]).view(1, 4, 1, 1)
    first, second = (torch.rand(2, 4, 8, 16) * scale for _ in range(2))
    packed = running_ranges.encode(first, form)
    assert packed.numel() == running_ranges.packed_bytes(form, 1024) == 1024 + 4 * 8
    one, two = ranges(packed), ranges(running_ranges.encode(2 * second, form))
    batch = torch.stack((first.amin((0, 2, 3)), first.amax((0, 2, 3)) - first.amin((0, 2, 3))))
    torch.testing.assert_close(one, batch)
    new = 2 * torch.stack((second.amin((0, 2, 3)),
                           second.amax((0, 2, 3)) - second.amin((0, 2, 3))))  # fmt: skip
    torch.testing.assert_close(two, 0.9 * one + 0.1 * new)
    # What the range does not reach is its end, above as below.
    wide = decoded(10 * first - 5, form)
    low, width = ranges(running_ranges.encode(10 * first - 5, form))
    assert (wide[:, :3] <= (low + width)[:3, None, None] * 1.2 + 0.1).all()
    assert not wide[:, 3].isnan().any()


def ranges(packed: Tensor) -> Tensor:
    return packed[-32:].view(torch.float32).view(2, 4).clone()


def decoded(value: Tensor, form: str) -> Tensor:
    packed = running_ranges.encode(value, form)
    return running_ranges.decode(packed, form, list(value.shape), torch.float32)


def test_rounding_within_the_range_has_no_bias() -> None:
    torch.manual_seed(0)
    value = torch.randn(64, 16)
    form = running_ranges.form_for((64, 16))
    draws = torch.stack([decoded(value, form) for _ in range(300)])
    step = (value.max() - value.min()) / 255
    assert (draws - value).abs().max() <= step
    assert (draws.mean(0) - value).abs().max() <= 5 * 0.5 * step / 300**0.5


def test_groups_of_fp8_are_finer_where_there_are_outliers() -> None:
    torch.manual_seed(0)
    value = torch.randn(32, 64)
    value[:, 5] *= 1e5
    errors = {}
    for form in (mixed_fp8.TENSOR, mixed_fp8.GROUPS):
        packed = mixed_fp8.encode(value, form)
        assert packed.numel() == mixed_fp8.packed_bytes(form, 2048)
        found = mixed_fp8.decode(packed, form, [32, 64], torch.float32)
        assert found.isfinite().all()
        rest = torch.arange(64) >= 16
        errors[form] = float((found - value)[:, rest].norm() / value[:, rest].norm())
    # Three bits of fraction: a sixteenth at most, a scale in bfloat16 adds little.
    assert errors[mixed_fp8.GROUPS] < 0.04 < errors[mixed_fp8.TENSOR]
    assert mixed_fp8.packed_bytes(mixed_fp8.GROUPS, 2048) == 2048 * (1 + 0.125)
    odd = torch.randn(3, 7)
    back = mixed_fp8.decode(
        mixed_fp8.encode(odd, mixed_fp8.TENSOR), mixed_fp8.TENSOR, [3, 7], torch.float32
    )
    torch.testing.assert_close(back, odd, rtol=0.07, atol=1e-2)
