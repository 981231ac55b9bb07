"""What ``benchmarks/triton_gpu.py`` measures: one function for each group of targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# isort: off
from triton_clock import Bench  # first: it makes mopt importable
import torch
import triton_checks as checked
from mopt.backends.triton.kernel import Problem, problem
from mopt.backends.triton.kernels import (
    cut_cross_entropy,
    flash_attention,
    flash_svd_attention,
    flash_svd_ffn,
    linear_bytes,
    linear_codes,
    rms_norm,
    saved_activations,
    swiglu,
)
from mopt.backends.triton.launch import Tile
from mopt.backends.triton.lowerings._bytes import LINEAR_BYTES
from mopt.backends.triton.lowerings.attention import FLASH_ATTENTION
from mopt.backends.triton.lowerings.flash_svd_ffn import FLASH_SVD_FFN
from mopt.backends.triton.lowerings.linear_codes import LINEAR_CODES
# isort: on

_functional = torch.nn.functional


def copies(bench: Bench, size: float) -> int:
    """How many of a thing go beyond three times the cache."""
    return max(1, min(32, int(3 * bench.cache / size) + 1))


def codes_of(bench: Bench, kind: str, rows: int, n: int, k: int, peer: bool = True,
             **wanted: float) -> None:  # fmt: skip
    """Weight-only linear beside the bf16 product."""
    rows, n, k = bench.size(rows, 20), bench.size(n, 128), bench.size(k, 256)
    weight, _ = checked.random_weight(kind, n, k, bench.device, torch.bfloat16)
    weights = [weight]
    for _ in range(copies(bench, weight.bytes) - 1):
        weights.append(type(weight)(**{
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in vars(weight).items()
        }))  # fmt: skip
    x = bench.randn(rows, k)
    counters = torch.zeros(
        linear_codes.counters_needed(weight), dtype=torch.int32, device=bench.device
    )
    facts = problem("linear-codes", kind=kind, outputs=n, columns=k, group=weight.group,
                    units=weight.units, zeros=False, bias=False, itemsize=2, rows=rows)  # fmt: skip

    def calls(config: Tile) -> list[Callable[[], Any]]:
        return [
            lambda w=w: linear_codes.call(bench.run, config, x, w, None, counters)  # type: ignore[misc]
            for w in weights
        ]

    seconds, config = bench.tuned(LINEAR_CODES, facts, calls)
    dense = None
    if peer:
        plain = [bench.randn(n, k) for _ in range(copies(bench, 2 * n * k))]
        dense = bench.seconds([lambda w=w: _functional.linear(x, w) for w in plain])  # type: ignore[misc]
    moved = weight.bytes + 2 * rows * (n + k)
    bench.row(f"{kind} weights, {rows} rows, {k} x {n}", seconds, bytes=moved,
              flops=2.0 * rows * n * k if rows > 64 else 0.0, peer=dense,
              against="torch.matmul bf16", note=config, **wanted)  # fmt: skip


def weight_only(bench: Bench) -> None:
    """int4 at the sizes that the targets name, and torchao's where it is installed."""
    codes_of(bench, "int4", 1, 28_672, 8192, least_ratio=3.0, least_copy=0.75)
    codes_of(bench, "int4", 16, 28_672, 8192, least_ratio=2.5)
    codes_of(bench, "int4", 4096, 28_672, 8192, least_ratio=0.9)
    codes_of(bench, "int4", 1, 4096, 4096, least_ratio=2.0)
    torchao_peer(bench)


def torchao_peer(bench: Bench) -> None:
    """torchao's int4 weights in groups of 128, one row."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_
    except ImportError:
        print("torchao is not installed", flush=True)
        return
    layer = torch.nn.Linear(8192, 28_672, bias=False, device=bench.device, dtype=torch.bfloat16)
    quantize_(layer, Int4WeightOnlyConfig(group_size=128))
    x = bench.randn(1, 8192)
    with torch.no_grad():
        theirs = bench.seconds([lambda: layer(x)])
    bench.row("torchao int4 weights, 1 rows, 8192 x 28672", theirs)


def formats(bench: Bench) -> None:
    """The other formats for one row."""
    shares = {"int8": 0.8, "e4m3": 0.8, "int2": 0.5, "int3": 0.5, "nf4": 0.5, "e2m1": 0.65,
              "bitmod4": math.nan}  # fmt: skip
    for kind, share in shares.items():
        codes_of(bench, kind, 1, 28_672, 8192, peer=False, least_copy=share)


def eight_bit(bench: Bench) -> None:
    """8-bit products of 8192 cubed beside bf16, and torch's own fp8."""
    n = bench.size(8192, 128)
    a, b = bench.randn(n, n), bench.randn(n, n)
    dense = bench.seconds([lambda: torch.matmul(a, b.t())])
    one = torch.ones(n, device=bench.device)
    for kind, ratio in (("int8", 1.4), ("e4m3", 1.5)):
        if kind == "int8":
            x, w = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=bench.device)
                    for _ in range(2))  # fmt: skip
        else:
            x, w = (t.to(torch.float8_e4m3fn).view(torch.uint8) for t in (a, b))
        facts = problem("linear-bytes", kind=kind, outputs=n, columns=n, units=n // 128, bias=False,
                        itemsize=2, rows=n)  # fmt: skip

        def calls(config: Tile, x: Any = x, w: Any = w) -> list[Callable[[], Any]]:
            return [lambda: linear_bytes.call(bench.run, config, x, w, one, one, None, n)]

        seconds, config = bench.tuned(LINEAR_BYTES, facts, calls)
        bench.row(f"{kind} linear {n} cubed", seconds, flops=2.0 * n**3, peer=dense,
                  against="torch.matmul bf16", note=config, least_ratio=ratio)  # fmt: skip
    if bench.device == "cpu":
        return
    p, q = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    scale = torch.ones((), device=bench.device)
    theirs = bench.seconds(
        [lambda: torch._scaled_mm(p, q.t(), scale, scale, out_dtype=torch.bfloat16)]
    )
    bench.row(f"torch._scaled_mm fp8 {n} cubed", theirs, flops=2.0 * n**3, peer=dense,
              against="torch.matmul bf16")  # fmt: skip


def memory_bound(bench: Bench) -> None:
    """Norms, SwiGLU and saved activations, beside torch.compile."""
    rows, width = bench.size(16_384, 8), bench.size(8192, 256)
    x, grad, weight = bench.randn(rows, width), bench.randn(rows, width), bench.randn(width)
    size = 2.0 * rows * width
    compiled = bench.compiled(lambda a: _functional.rms_norm(a, (width,), weight, 1e-5))
    compiled(x)
    theirs = bench.seconds([lambda: compiled(x)])
    ours = bench.seconds([lambda: rms_norm.forward(bench.run, x, weight, 1e-5)])
    bench.row("rms norm forward", ours, bytes=2 * size, peer=theirs, against="torch.compile",
              least_copy=0.85)  # fmt: skip
    rstd = rms_norm.forward(bench.run, x, weight, 1e-5)[2]
    ours = bench.seconds([lambda: rms_norm.backward(bench.run, grad, x, weight, rstd)])
    bench.row("rms norm backward", ours, bytes=3 * size, least_copy=0.65)
    fused = bench.compiled(lambda a, b: _functional.silu(a) * b)
    fused(x, grad)
    theirs = bench.seconds([lambda: fused(x, grad)])
    ours = bench.seconds([lambda: swiglu.forward(bench.run, x, grad)])
    bench.row("swiglu forward", ours, bytes=3 * size, peer=theirs, against="torch.compile")
    for kind, bits in (("int8", 8), ("int4", 4), ("e4m3", 8)):
        codes, scale = saved_activations.compress(bench.run, x, kind)
        moved = size * (1 + bits / 16 + 4 / 256)
        ours = bench.seconds([lambda k=kind: saved_activations.compress(bench.run, x, k)])  # type: ignore[misc]
        bench.row(f"saved activations {kind}", ours, bytes=moved)
        ours = bench.seconds(
            [lambda k=kind, c=codes, s=scale: saved_activations.restore(bench.run, c, s, x, k)]  # type: ignore[misc]
        )
        bench.row(f"saved activations {kind}, back", ours, bytes=moved)


def attention(bench: Bench) -> None:
    """Prefill beside PyTorch's attention, decoding with an 8-bit cache beside bf16."""
    tokens, width = bench.size(4096, 40), bench.size(128, 16)
    batch, heads = bench.size(4, 1), bench.size(8, 1)
    for causal in (True, False):
        q, k = (
            bench.randn(batch, 4 * heads, tokens, width),
            bench.randn(batch, heads, tokens, width),
        )
        theirs = bench.seconds([lambda q=q, k=k, c=causal: _functional.scaled_dot_product_attention(  # type: ignore[misc]
            q, k, k, is_causal=c, enable_gqa=True)])  # fmt: skip
        facts = attention_facts(batch, heads, 4, tokens, tokens, width, 2, causal)

        def calls(config: Tile, q: Any = q, k: Any = k, c: bool = causal) -> list[Any]:
            return [lambda: flash_attention.call(bench.run, config, q, k, k, causal=c)]

        seconds, config = bench.tuned(FLASH_ATTENTION, facts, calls)
        flops = 4.0 * batch * 4 * heads * tokens**2 * width * (0.5 if causal else 1.0)
        bench.row(f"attention prefill {tokens}, causal={causal}", seconds, flops=flops,
                  peer=theirs, against="scaled_dot_product_attention", note=config,
                  least_ratio=1.0, least_tflops=475, either=True)  # fmt: skip
    batch, keys = bench.size(16, 1), bench.size(8192, 70)
    q, wide = bench.randn(batch, 4 * heads, 1, width), bench.randn(batch, heads, keys, width)
    scale = torch.rand(batch, heads, keys, device=bench.device)
    plain = 0.0
    for kind, dtype in (("bf16", None), ("int8", torch.int8), ("e4m3", torch.uint8)):
        cache = wide if dtype is None else torch.zeros(wide.shape, dtype=dtype, device=bench.device)
        scales = {} if dtype is None else {"k_scale": scale, "v_scale": scale}
        facts = attention_facts(batch, heads, 4, 1, keys, width, 2 if dtype is None else 1, False)

        def decode(config: Tile, cache: Any = cache, scales: Any = scales) -> list[Any]:
            return [lambda: flash_attention.call(bench.run, config, q, cache, cache, **scales)]

        seconds, config = bench.tuned(FLASH_ATTENTION, facts, decode)
        plain = plain or seconds
        # Keys and values are one tensor here, read twice.
        bench.row(f"attention decode {keys}, {kind} cache", seconds,
                  bytes=2.0 * cache.numel() * cache.element_size(), peer=plain,
                  against="the bf16 cache", note=config,
                  least_ratio=1.7 if dtype is not None else math.nan)  # fmt: skip


def attention_facts(batch: int, heads: int, group: int, queries: int, keys: int, width: int,
                    keysize: int, causal: bool) -> Problem:  # fmt: skip
    """One use of the attention kernel."""
    return problem("flash-attention", batch=batch, heads=heads, group=group, width=width,
                   outputs=heads * group * width, causal=causal, units=max(1, keys // 64),
                   keys=keys, keysize=keysize, itemsize=2, rows=queries * group)  # fmt: skip


def cross_entropy(bench: Bench) -> None:
    """Loss and gradients of 8192 tokens and 256 000 words beside logits in memory."""
    tokens, words, width = bench.size(8192, 32), bench.size(256_000, 100), bench.size(2304, 64)
    e, c = bench.randn(tokens, width) * 0.1, bench.randn(words, width) * 0.1
    labels = torch.randint(0, words, (tokens,), device=bench.device)

    def dense() -> Any:
        a, b = e.detach().requires_grad_(), c.detach().requires_grad_()
        loss = _functional.cross_entropy((a @ b.t()).float(), labels)
        loss.backward()
        return a.grad, b.grad

    def ours() -> Any:
        loss, sums = cut_cross_entropy.forward(bench.run, e, c, labels)
        grad = torch.full_like(loss, 1 / len(loss))
        return cut_cross_entropy.backward(bench.run, grad, e, c, labels, sums)

    ours()
    forward = bench.peak(lambda: cut_cross_entropy.forward(bench.run, e, c, labels))
    logits = bench.peak(lambda: _functional.cross_entropy((e @ c.t()).float(), labels))
    theirs = bench.seconds([dense], graph=False)
    bench.row("cross entropy, forward and backward", bench.seconds([ours], graph=False),
              peer=theirs, against="F.cross_entropy", memory=forward, dense_memory=logits,
              least_ratio=1.0, most_memory=0.01)  # fmt: skip


def flash_svd(bench: Bench) -> None:
    """BERT-base shapes, sequence 512, batch 32: the same factors, and the dense model."""
    batch, tokens, heads = bench.size(32, 1), bench.size(512, 20), bench.size(12, 1)
    hidden = bench.size(768, 128)
    for rank, name in ((64, "64 a head"), (32, "half")):
        factors = [(bench.randn(batch, heads, tokens, rank), bench.randn(heads, rank, 64) * 0.1)
                   for _ in range(3)]  # fmt: skip
        q, k, v = factors

        def ours(q: Any = q, k: Any = k, v: Any = v) -> torch.Tensor:
            return flash_svd_attention.call(bench.run, q, k, v)

        def dense(q: Any = q, k: Any = k, v: Any = v) -> torch.Tensor:
            return flash_svd_attention.reference(q, k, v)

        _beside(bench, f"flash-svd attention, rank {name}", ours, dense)
    rows, rank, inner = batch * tokens, hidden // 2, 4 * hidden
    up, down = (bench.randn(rows, rank), bench.randn(rank, inner) * 0.05), bench.randn(inner, rank)
    facts = problem("flash-svd-ffn", inner=inner, rank=rank, rank_out=rank, outputs=rank,
                    units=inner // 32, gated=False, itemsize=2, rows=rows)  # fmt: skip
    _, config = bench.tuned(
        FLASH_SVD_FFN, facts,
        lambda tile: [lambda: flash_svd_ffn.call(bench.run, up, down, config=tile)],
    )  # fmt: skip
    best = next(t for t in bench.fitting(FLASH_SVD_FFN, facts) if str(t) == config)
    _beside(bench, "flash-svd ffn", lambda: flash_svd_ffn.call(bench.run, up, down, config=best),
            lambda: flash_svd_ffn.reference(up, down))  # fmt: skip
    # Ranks of half the width against the dense model: the whole feed-forward block.
    x, first, last = bench.randn(rows, hidden), bench.randn(hidden, rank), bench.randn(rank, hidden)
    wide, narrow = bench.randn(inner, hidden), bench.randn(hidden, inner)

    def low_rank() -> torch.Tensor:
        middle = flash_svd_ffn.call(bench.run, (x @ first, up[1]), down, config=best)
        return middle @ last

    def whole() -> torch.Tensor:
        return _functional.linear(_functional.gelu(_functional.linear(x, wide)), narrow)

    bench.row("flash-svd ffn at half the width", bench.seconds([low_rank]),
              peer=bench.seconds([whole]), against="the dense block", least_ratio=1.0)  # fmt: skip


def _beside(bench: Bench, name: str, ours: Callable[[], Any], dense: Callable[[], Any]) -> None:
    ours()
    bench.row(name, bench.seconds([ours]), peer=bench.seconds([dense]),
              against="the same factors, dense kernels", memory=bench.peak(ours),
              dense_memory=bench.peak(dense), least_ratio=1.0, most_memory=0.3)  # fmt: skip
