"""Kernels with a backward pass against autograd in float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mopt.backends.triton.interpreter import run_interpreted
from mopt.backends.triton.kernels import cut_cross_entropy, rms_norm, rotary, swiglu
from mopt.backends.triton.launch import tile

LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
DTYPES = st.sampled_from(tuple(LIMITS))


def leaves(*values: Tensor) -> list[Tensor]:
    """Copies in float64 that collect gradients."""
    return [value.double().requires_grad_(True) for value in values]


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the type's rounding, relative to the largest value."""
    scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 1.0)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=LIMITS[dtype] * scale)


@settings(max_examples=8)
@given(rows=st.sampled_from((0, 1, 5)), width=st.sampled_from((1, 33, 64)), dtype=DTYPES)
def test_rms_norm_forward_and_backward(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, width).to(dtype), (torch.rand(width) + 0.5).to(dtype)
    grad = torch.randn(rows, width).to(dtype)
    out, total, rstd = rms_norm.forward(run_interpreted, x, weight, 1e-5)
    dx, dweight = rms_norm.backward(run_interpreted, grad, x, weight, rstd)
    a, w = leaves(x, weight)
    wanted = rms_norm.reference(a, w, 1e-5)
    wanted.backward(grad.double())
    assert a.grad is not None and w.grad is not None and total is x
    close(out, wanted.detach(), dtype)
    close(dx, a.grad, dtype)
    close(dweight, w.grad, dtype)


def test_a_residual_is_added_before_the_norm_and_written() -> None:
    x, residual, weight = torch.randn(3, 40), torch.randn(3, 40), torch.rand(40)
    out, total, _ = rms_norm.forward(run_interpreted, x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    close(out, rms_norm.reference(x + residual, weight, 1e-5), torch.float32)


@settings(max_examples=8)
@given(
    tokens=st.sampled_from((0, 1, 4)), heads=st.sampled_from((1, 3)),
    width=st.sampled_from((2, 12)), interleaved=st.booleans(), dtype=DTYPES,
)  # fmt: skip
def test_rotary_keeps_norms_and_is_undone_by_its_backward(
    tokens: int, heads: int, width: int, interleaved: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(tokens, heads, width).to(dtype)
    angle = torch.randn(tokens, width // 2)
    cos, sin = angle.cos(), angle.sin()
    out = rotary.call(run_interpreted, x, cos, sin, interleaved=interleaved)
    close(out, rotary.reference(x.double(), cos.double(), sin.double(), interleaved=interleaved),
          dtype)  # fmt: skip
    close(out.double().norm(dim=-1), x.double().norm(dim=-1), dtype)
    back = rotary.call(run_interpreted, out, cos, sin, interleaved=interleaved, backward=True)
    close(back, x, dtype)


def test_rotary_reads_heads_before_tokens_in_place_and_half_of_the_angles() -> None:
    x = torch.randn(2, 4, 3, 8).transpose(1, 2)  # (batch, heads, tokens, width)
    angle = torch.randn(4, 4)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    out = rotary.call(run_interpreted, x, cos, sin)
    left, right = x.chunk(2, -1)
    close(out, x * cos + torch.cat((-right, left), -1) * sin, torch.float32)
    assert out.shape == x.shape and out.stride() == x.stride()


@settings(max_examples=6)
@given(count=st.sampled_from((0, 1, 1025)), dtype=DTYPES)
def test_swiglu_forward_and_backward(count: int, dtype: torch.dtype) -> None:
    gate, up, grad = ((3 * torch.randn(count)).to(dtype) for _ in range(3))
    out = swiglu.forward(run_interpreted, gate, up)
    dgate, dup = swiglu.backward(run_interpreted, grad, gate, up)
    a, b = leaves(gate, up)
    wanted = swiglu.reference(a, b)
    wanted.backward(grad.double())
    assert a.grad is not None and b.grad is not None
    for found, right in ((out, wanted.detach()), (dgate, a.grad), (dup, b.grad)):
        close(found, right, dtype)


SMALL = tile(4, 2, BT=16, BV=16, BD=16)


@settings(max_examples=8)
@given(
    tokens=st.sampled_from((1, 18)), words=st.sampled_from((3, 50)), width=st.sampled_from((8, 21)),
    cap=st.sampled_from((None, 3.0)), dtype=st.sampled_from((torch.float32, torch.float16)),
)  # fmt: skip
def test_cross_entropy_without_logits(
    tokens: int, words: int, width: int, cap: float | None, dtype: torch.dtype
) -> None:
    e, c = torch.randn(tokens, width).to(dtype), torch.randn(words, width).to(dtype)
    labels = torch.randint(0, words, (tokens,))
    labels[0] = cut_cross_entropy.IGNORED
    grad = torch.rand(tokens)
    loss, sums = cut_cross_entropy.forward(run_interpreted, e, c, labels, cap=cap, config=SMALL)
    de, dc = cut_cross_entropy.backward(
        run_interpreted, grad, e, c, labels, sums, cap=cap, exact=True, config=SMALL
    )
    a, b = leaves(e, c)
    wanted = cut_cross_entropy.reference(a, b, labels, cap=cap)
    wanted.backward(grad.double())
    assert a.grad is not None and b.grad is not None
    assert float(loss[0]) == 0 and not de[0].any()
    for found, right in ((loss, wanted.detach()), (de, a.grad), (dc, b.grad)):
        close(found, right, dtype)


def test_gradients_that_are_left_out_are_below_the_filter() -> None:
    e, c = torch.randn(16, 16), 4 * torch.randn(64, 16)
    labels = (e @ c.t()).argmax(-1)  # a model that is nearly sure of most words
    loss, sums = cut_cross_entropy.forward(run_interpreted, e, c, labels, config=SMALL)
    grad = torch.ones_like(loss)
    exact, filtered = (
        cut_cross_entropy.backward(
            run_interpreted, grad, e, c, labels, sums, exact=exact, config=SMALL
        )
        for exact in (True, False)
    )
    for one, other, factor in ((exact[0], filtered[0], c), (exact[1], filtered[1], e)):
        bound = cut_cross_entropy.FILTER * factor.abs().sum(0).max()
        assert float((one - other).abs().max()) <= float(bound)


@pytest.mark.parametrize("tokens", [0])
def test_no_tokens_no_loss(tokens: int) -> None:
    e, c, labels = torch.randn(tokens, 8), torch.randn(9, 8), torch.zeros(tokens, dtype=torch.long)
    loss, sums = cut_cross_entropy.forward(run_interpreted, e, c, labels, config=SMALL)
    de, dc = cut_cross_entropy.backward(run_interpreted, loss, e, c, labels, sums, config=SMALL)
    assert loss.shape == (0,) and de.shape == (0, 8) and not dc.any()
