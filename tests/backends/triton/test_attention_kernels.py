"""Attention and low-rank kernels against their references, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopt.backends.triton.interpreter import run_interpreted
from mopt.backends.triton.kernels import (
    flash_attention,
    flash_svd_attention,
    flash_svd_ffn,
    linear_low_rank,
)
from mopt.backends.triton.launch import tile


def attend(*args: torch.Tensor, split: int = 1, **options: object) -> torch.Tensor:
    """The kernel's outputs with small tiles."""
    config = tile(4, 2, BM=16, BN=16, SPLIT=split)
    return flash_attention.call(run_interpreted, config, *args, **options)[0]


@settings(max_examples=16)
@given(
    queries=st.sampled_from((1, 5, 20)),
    keys=st.sampled_from((1, 17, 40)),
    group=st.sampled_from((1, 3)),
    width=st.sampled_from((8, 20)),
    causal=st.booleans(),
    window=st.sampled_from((None, 1, 7)),
    split=st.sampled_from((1, 3)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    masked=st.sampled_from(("none", "bool", "float")),
)
def test_attention_with_every_mask(
    queries: int, keys: int, group: int, width: int, causal: bool, window: int | None, split: int,
    dtype: torch.dtype, masked: str,
) -> None:  # fmt: skip
    given_mask = {
        "none": None, "bool": torch.rand(1, 1, queries, keys) > 0.4,
        "float": torch.randn(1, 2 * group, 1, keys).to(dtype),
    }[masked]  # fmt: skip
    q = torch.randn(1, 2 * group, queries, width).to(dtype)
    k, v = (torch.randn(1, 2, keys, width).to(dtype) for _ in range(2))
    found = attend(q, k, v, causal=causal, window=window, split=split, mask=given_mask)
    wanted = flash_attention.reference(
        q.double(), k.double(), v.double(), causal=causal, window=window, mask=given_mask
    )
    limit = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=limit)


def test_attention_is_pytorchs_own() -> None:
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attend(q, k, v, causal=True), wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
def test_views_of_a_larger_cache_are_read_in_place(dtype: torch.dtype, limit: float) -> None:
    cache = torch.randn(2, 2, 64, 16).to(dtype)
    k, v = cache[:, :, 3:20], cache[:, :, 30:47]
    q = torch.randn(2, 7, 2, 16).to(dtype).transpose(1, 2)
    wanted = flash_attention.reference(q.double(), k.double(), v.double())
    torch.testing.assert_close(attend(q, k, v).double(), wanted, rtol=0, atol=limit)


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
@pytest.mark.parametrize("split", [1, 2])
def test_caches_in_eight_bits_are_the_decoded_cache(kind: str, split: int) -> None:
    q = torch.randn(1, 4, 1, 16)
    scales = [torch.rand(1, 2, 33) * 0.02 + 0.01 for _ in range(2)]
    if kind == "int8":
        codes = [torch.randint(-127, 128, (1, 2, 33, 16), dtype=torch.int8) for _ in range(2)]
        wide = [c.float() * s[..., None] for c, s in zip(codes, scales, strict=True)]
    else:
        floats = [(torch.randn(1, 2, 33, 16) * 40).to(torch.float8_e4m3fn) for _ in range(2)]
        wide = [f.float() * s[..., None] for f, s in zip(floats, scales, strict=True)]
        codes = [f.view(torch.uint8) for f in floats]
    found = attend(q, *codes, k_scale=scales[0], v_scale=scales[1], split=split)
    torch.testing.assert_close(found, flash_attention.reference(q, *wide), rtol=0, atol=1e-5)


@settings(max_examples=8)
@given(
    rows=st.sampled_from((0, 1, 19)),
    outputs=st.sampled_from((1, 40, 70)),
    columns=st.sampled_from((3, 33, 64)),
    rank=st.sampled_from((1, 7, 20)),
    has_bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float16)),
)
def test_low_rank_linears_never_write_their_middle(
    rows: int, outputs: int, columns: int, rank: int, has_bias: bool, dtype: torch.dtype
) -> None:
    x, inner = torch.randn(rows, columns).to(dtype), torch.randn(rank, columns).to(dtype)
    outer, bias = torch.randn(outputs, rank).to(dtype), torch.randn(outputs).to(dtype)
    config = tile(4, 2, BM=16, BN=16, BK=16, SPLIT=2)
    given_bias = bias if has_bias else None
    found = linear_low_rank.call(run_interpreted, config, x, inner, outer, given_bias)
    wanted = linear_low_rank.reference(
        x.double(), inner.double(), outer.double(), bias.double() if has_bias else None
    )
    limit = (1e-5 if dtype == torch.float32 else 1e-2) * max(
        1.0, float(wanted.abs().max()) if rows else 1.0
    )
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=limit)


def test_ranks_filled_up_with_zeros_change_nothing() -> None:
    x, inner, outer = torch.randn(4, 32), torch.randn(5, 32), torch.randn(24, 5)
    config = tile(4, 2, BM=16, BN=16, BK=16, SPLIT=1)
    pad = torch.nn.functional.pad
    found = linear_low_rank.call(run_interpreted, config, x, inner, outer, None)
    wide = linear_low_rank.call(
        run_interpreted, config, x, pad(inner, (0, 0, 0, 6)), pad(outer, (0, 6)), None
    )
    assert torch.equal(found, wide)


@pytest.mark.parametrize(("causal", "padded"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("shared", [False, True])
def test_absorbed_attention_is_that_of_dense_keys(
    tokens: int, causal: bool, padded: bool, shared: bool
) -> None:
    pairs = [
        (torch.randn(2, 1 if shared else 3, tokens, r).expand(2, 3, -1, -1), torch.randn(3, r, 16))
        for r in (6, 5, 20)
    ]
    bias, v_bias = torch.randn(3, 16), torch.randn(3, 16)
    mask = (torch.rand(2, 1, 1, tokens) > 0.5).index_fill(3, torch.tensor(0), True)
    options = {"bias": bias, "v_bias": v_bias, "causal": causal, "mask": mask if padded else None}
    config = tile(4, 2, BM=16, BN=16)
    found = flash_svd_attention.call(run_interpreted, *pairs, config=config, **options)
    wanted = flash_svd_attention.reference(*pairs, **options)
    limit = 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 20])
def test_the_middle_of_a_feed_forward_block_stays_in_registers(rows: int, gated: bool) -> None:
    up = (torch.randn(rows, 20), torch.randn(20, 70))
    gate = (torch.randn(rows, 20), torch.randn(20, 70)) if gated else None
    down, bias = torch.randn(70, 12), torch.randn(70)
    kind = "silu" if gated else "gelu"
    config = tile(4, 2, BM=16, BD=32)
    found = flash_svd_ffn.call(
        run_interpreted, up, down, gate=gate, bias=bias, activation=kind, config=config
    )
    wanted = flash_svd_ffn.reference(up, down, gate=gate, bias=bias, activation=kind)
    limit = 2e-5 * (float(wanted.abs().max()) if rows else 1.0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit)
