"""8-bit products, rounding of tensors and rows, and saved activations, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopt.backends.triton.interpreter import run_interpreted
from mopt.backends.triton.kernels import (
    linear_bytes,
    norm_quantize,
    quantize_tensor,
    saved_activations,
)
from mopt.backends.triton.launch import tile

SMALL = tile(4, 2, BM=16, BN=32, BK=32)


def padded(codes: torch.Tensor) -> torch.Tensor:
    """A weight with rows and columns as the kernel wants them."""
    rows, columns = -codes.shape[0] % 128, -codes.shape[1] % 128
    return torch.nn.functional.pad(codes, (0, columns, 0, rows))


def scales(outputs: int) -> torch.Tensor:
    """Scales of channels, with those of the padding."""
    return torch.nn.functional.pad(torch.rand(outputs) + 0.5, (0, -outputs % 128))


@settings(max_examples=8)
@given(
    rows=st.sampled_from((0, 1, 17)),
    outputs=st.sampled_from((1, 33, 130)),
    columns=st.sampled_from((32, 65, 130)),
    activation=st.sampled_from(linear_bytes.ACTIVATIONS),
)
def test_products_of_integers_are_exact_before_they_are_scaled(
    rows: int, outputs: int, columns: int, activation: str
) -> None:
    a = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    b = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8)
    left, right, bias = torch.rand(rows), scales(outputs), torch.randn(outputs)
    zero = torch.tensor([3], dtype=torch.int32)
    sums = padded(b).sum(1, dtype=torch.int32)
    found = linear_bytes.call(
        run_interpreted, SMALL, a, padded(b), left, right, bias, outputs, zero=zero, sums=sums,
        activation=activation, dtype=torch.float32,
    )  # fmt: skip
    wanted = linear_bytes.reference(
        a, padded(b), left, right, bias, outputs, zero=zero, activation=activation
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-2)
    ones = torch.ones(1)
    plain = linear_bytes.call(
        run_interpreted, SMALL, a, padded(b), ones, torch.ones_like(right), None, outputs,
        dtype=torch.float32,
    )  # fmt: skip
    assert torch.equal(plain.int(), a.int() @ b.int().t())


@settings(max_examples=6)
@given(
    rows=st.sampled_from((0, 1, 17)),
    columns=st.sampled_from((1, 33, 130)),
    zero=st.sampled_from((0, 77, 255)),
)
def test_codes_without_a_sign_are_taken_as_they_are(rows: int, columns: int, zero: int) -> None:
    a = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    b = torch.randint(-127, 128, (20, columns), dtype=torch.int8)
    wide = padded(b)
    found = linear_bytes.call(
        run_interpreted, SMALL, a, wide, torch.ones(1), scales(20) * 0 + 1, None, 20,
        zero=torch.tensor([zero - 128], dtype=torch.int32), sums=wide.sum(1, dtype=torch.int32),
        dtype=torch.float32,
    )  # fmt: skip
    assert torch.equal(found.int(), (a.int() - zero) @ b.int().t())


def test_products_of_eight_bit_floats() -> None:
    a = torch.randn(5, 70).to(torch.float8_e4m3fn).view(torch.uint8)
    b = torch.randn(20, 70).to(torch.float8_e4m3fn).view(torch.uint8)
    left, right = torch.rand(5), scales(20)
    found = linear_bytes.call(
        run_interpreted, SMALL, a, padded(b), left, right, None, 20, dtype=torch.float32
    )
    wanted = linear_bytes.reference(a, padded(b), left, right, None, 20)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 1000, 5000])
def test_a_tensor_is_rounded_as_the_operator_does(count: int, dtype: torch.dtype) -> None:
    x = (torch.randn(count) + 0.3).to(dtype)
    codes, scale, zero = quantize_tensor.call(run_interpreted, x)
    wanted, wanted_scale, wanted_zero = quantize_tensor.reference(x)
    assert torch.equal(codes, wanted) and torch.equal(zero, wanted_zero)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)


def test_a_tensor_of_zeros_has_scale_zero_and_codes_that_mean_zero() -> None:
    codes, scale, zero = quantize_tensor.call(run_interpreted, torch.zeros(70))
    assert float(scale) == 0 and bool((codes == zero).all())


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
@pytest.mark.parametrize("width", [1, 48, 100])
def test_rows_are_normed_and_rounded_in_one_pass(width: int, kind: str) -> None:
    x, weight = torch.randn(3, width), torch.rand(width) + 0.5
    x[1] = 0
    codes, scale = norm_quantize.call(run_interpreted, x, weight, 1e-5, kind)
    wanted, wanted_scale = norm_quantize.reference(x, weight, 1e-5, kind)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-5, atol=0)
    # Another order of additions may move a value over the middle between two codes.
    same = (codes == wanted).float().mean()
    assert same >= 0.98 and not codes[1].any() and float(scale[1]) == 1
    assert norm_quantize.call(run_interpreted, x[:0], weight, 1e-5, kind)[0].shape == (0, width)


@settings(max_examples=10)
@given(
    width=st.sampled_from((1, 48, 100)),
    centered=st.booleans(),
    affine=st.booleans(),
    codes=st.sampled_from((torch.uint8, torch.int8)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
)
def test_a_norm_with_a_known_range_gives_the_operators_codes(
    width: int, centered: bool, affine: bool, codes: torch.dtype, dtype: torch.dtype
) -> None:
    x = (torch.randn(3, width) * 2).to(dtype)
    weight, bias = (torch.randn(width).to(dtype) if affine else None for _ in range(2))
    bias = bias if centered else None
    scale, zero = torch.tensor([0.011]), torch.tensor([5], dtype=codes)
    found = norm_quantize.call_static(
        run_interpreted, x, weight, 1e-5, scale, zero, bias=bias, centered=centered
    )
    wide = [None if v is None else v.double() for v in (weight, bias)]
    normed = norm_quantize.normed(x.double(), wide[0], 1e-5, bias=wide[1], centered=centered)
    wanted = torch.ops.mopt.quantize(normed, scale[0].double(), zero[0], 0)
    # A value in the middle between two codes may go either way.
    assert found.dtype == codes and int((found.int() - wanted.int()).abs().max()) <= 1
    assert float((found != wanted).float().mean()) <= 0.02
    assert norm_quantize.call_static(
        run_interpreted, x[:0], weight, 1e-5, scale, zero
    ).shape == (0, width)  # fmt: skip


def test_bits_of_small_floats_are_those_of_the_cast() -> None:
    values = torch.cat([
        torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float(),
        torch.randn(2000) * 30, torch.randn(2000) * 0.01, torch.tensor([1e9, -1e9, 448.1, 2e-10]),
    ]).nan_to_num(0.0)  # fmt: skip
    flat = values[: len(values) // 128 * 128]
    flat[-1] = 448.0  # a group whose scale is 1 keeps its values
    groups = flat.view(-1, 128).clamp(-448, 448)
    groups[:, 0] = 448.0
    codes, scale = saved_activations.compress(run_interpreted, groups, "e4m3")
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(codes, groups.to(torch.float8_e4m3fn).view(torch.int8).reshape(-1))


@settings(max_examples=10)
@given(
    kind=st.sampled_from(saved_activations.KINDS),
    shape=st.sampled_from(((0,), (1,), (3, 50), (130,), (2, 3, 64))),
    group=st.sampled_from((32, 64, 128)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
)
def test_activations_come_back_as_rounded(
    kind: str, shape: tuple[int, ...], group: int, dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    codes, scale = saved_activations.compress(run_interpreted, x, kind, group)
    found = saved_activations.restore(run_interpreted, codes, scale, x, kind, group)
    wanted = saved_activations.reference(x, kind, group)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-2 * (dtype != torch.float32),
                               atol=2e-6)  # fmt: skip


def test_rounding_by_chance_is_right_on_average_and_repeats() -> None:
    x = torch.full((1, 128), 0.3)
    x[0, 0] = 7.0  # the scale is 1
    sums = torch.zeros(128)
    for seed in range(24):
        codes, scale = saved_activations.compress(run_interpreted, x, "int4", seed=seed)
        again, _ = saved_activations.compress(run_interpreted, x, "int4", seed=seed)
        assert torch.equal(codes, again)
        sums += saved_activations.restore(run_interpreted, codes, scale, x, "int4")[0]
    # 24 * 127 draws of a chance of 0.3: within four deviations.
    mean = float(sums[1:].mean()) / 24
    assert abs(mean - 0.3) <= 4 * (0.21 / (24 * 127)) ** 0.5
