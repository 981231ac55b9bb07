"""mopt's Triton kernels on one GPU beside named peers: correctness first, then ratios in one run.

    python benchmarks/triton_gpu.py [--minutes 8.5] [--json FILE] [--only NAME,...]
    python benchmarks/triton_gpu.py --interpret        # correctness on a CPU, small sizes

Needs torch and triton and the files of this checkout, nothing else. Copy bandwidth and the rate of
products are read first; every time is the median of replays of a CUDA graph by CUDA events, weights
taken in turn from more memory than the cache holds, and is printed as a share of those limits and
as a ratio to its peer. Tiles are the best of the first few by the cost model, measured. Sections
stop when the minutes are over, and say so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

# isort: off
from triton_clock import Bench  # first: it makes mopt importable
import torch
import triton_checks as checked
from mopt.backends.triton.interpreter import run_interpreted
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
from mopt.backends.triton.lowerings.attention import FLASH_ATTENTION as FLASH
from mopt.backends.triton.lowerings.linear_codes import LINEAR_CODES
# isort: on

_functional = torch.nn.functional


def bf16(*shape: int) -> torch.Tensor:
    """Normal values on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def copies(bench: Bench, size: float) -> int:
    """How many of a thing go beyond three times the cache."""
    return max(1, min(32, int(3 * bench.cache / size) + 1))


def codes_of(bench: Bench, kind: str, rows: int, n: int, k: int, peer: bool = True) -> None:
    """Weight-only linear beside the bf16 product."""
    weight, _ = checked.random_weight(kind, n, k, "cuda", torch.bfloat16)
    weights = [weight]
    for _ in range(copies(bench, weight.bytes) - 1):
        weights.append(type(weight)(**{
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in vars(weight).items()
        }))  # fmt: skip
    x = bf16(rows, k)
    counters = torch.zeros(linear_codes.counters_needed(weight), dtype=torch.int32, device="cuda")
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
        plain = [bf16(n, k) for _ in range(copies(bench, 2 * n * k))]
        dense = bench.seconds([lambda w=w: _functional.linear(x, w) for w in plain])  # type: ignore[misc]
    moved = weight.bytes + 2 * rows * (n + k)
    bench.row(f"{kind} weights, {rows} rows, {k} x {n}", seconds, bytes=moved,
              flops=2.0 * rows * n * k if rows > 64 else 0.0, peer=dense,
              against="torch.matmul bf16", note=config)  # fmt: skip


def weight_only(bench: Bench) -> None:
    """int4 at the sizes that the targets name."""
    for rows in (1, 16, 4096):
        codes_of(bench, "int4", rows, 28_672, 8192)
    codes_of(bench, "int4", 1, 4096, 4096)


def formats(bench: Bench) -> None:
    """The other formats for one row."""
    for kind in ("int8", "e4m3", "int2", "int3", "nf4", "e2m1", "bitmod4"):
        codes_of(bench, kind, 1, 28_672, 8192, peer=False)


def eight_bit(bench: Bench) -> None:
    """8-bit products of 8192 cubed beside bf16, and torch's own fp8."""
    n = 8192
    a, b = bf16(n, n), bf16(n, n)
    dense = bench.seconds([lambda: torch.matmul(a, b.t())])
    one = torch.ones(n, device="cuda")
    for kind in ("int8", "e4m3"):
        if kind == "int8":
            x, w = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device="cuda")
                    for _ in range(2))  # fmt: skip
        else:
            x, w = (t.to(torch.float8_e4m3fn).view(torch.uint8) for t in (a, b))
        facts = problem("linear-bytes", kind=kind, outputs=n, columns=n, units=n // 128, bias=False,
                        itemsize=2, rows=n)  # fmt: skip

        def calls(config: Tile, x: Any = x, w: Any = w) -> list[Callable[[], Any]]:
            return [lambda: linear_bytes.call(bench.run, config, x, w, one, one, None, n)]

        seconds, config = bench.tuned(LINEAR_BYTES, facts, calls)
        bench.row(f"{kind} linear 8192 cubed", seconds, flops=2.0 * n**3, peer=dense,
                  against="torch.matmul bf16", note=config)  # fmt: skip
    p, q = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    scale = torch.ones((), device="cuda")
    theirs = bench.seconds(
        [lambda: torch._scaled_mm(p, q.t(), scale, scale, out_dtype=torch.bfloat16)]
    )
    bench.row("torch._scaled_mm fp8 8192 cubed", theirs, flops=2.0 * n**3, peer=dense,
              against="torch.matmul bf16")  # fmt: skip


def memory_bound(bench: Bench) -> None:
    """Norms, SwiGLU and saved activations, beside torch.compile."""
    rows, width = 16_384, 8192
    x, grad, weight = bf16(rows, width), bf16(rows, width), bf16(width)
    size = 2.0 * rows * width
    compiled = torch.compile(lambda a: _functional.rms_norm(a, (width,), weight, 1e-5))
    compiled(x)
    theirs = bench.seconds([lambda: compiled(x)])
    ours = bench.seconds([lambda: rms_norm.forward(bench.run, x, weight, 1e-5)])
    bench.row("rms norm forward", ours, bytes=2 * size, peer=theirs, against="torch.compile")
    rstd = rms_norm.forward(bench.run, x, weight, 1e-5)[2]
    ours = bench.seconds([lambda: rms_norm.backward(bench.run, grad, x, weight, rstd)])
    bench.row("rms norm backward", ours, bytes=3 * size)
    fused = torch.compile(lambda a, b: _functional.silu(a) * b)
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
    for causal in (True, False):
        q, k = bf16(4, 32, 4096, 128), bf16(4, 8, 4096, 128)
        theirs = bench.seconds([lambda q=q, k=k, c=causal: _functional.scaled_dot_product_attention(  # type: ignore[misc]
            q, k, k, is_causal=c, enable_gqa=True)])  # fmt: skip
        facts = _attention_facts(4, 8, 32, 4096, 4096, 2)

        def calls(config: Tile, q: Any = q, k: Any = k, c: bool = causal) -> list[Any]:
            return [lambda: flash_attention.call(bench.run, config, q, k, k, causal=c)]

        seconds, config = bench.tuned(FLASH, facts, calls)
        flops = 4.0 * 4 * 32 * 4096 * 4096 * 128 * (0.5 if causal else 1.0)
        bench.row(f"attention prefill 4096, causal={causal}", seconds, flops=flops, peer=theirs,
                  against="scaled_dot_product_attention", note=config)  # fmt: skip
    q, wide = bf16(16, 32, 1, 128), bf16(16, 8, 8192, 128)
    scale = torch.rand(16, 8, 8192, device="cuda")
    plain = 0.0
    for kind, dtype in (("bf16", None), ("int8", torch.int8), ("e4m3", torch.uint8)):
        cache = wide if dtype is None else torch.zeros(wide.shape, dtype=dtype, device="cuda")
        scales = {} if dtype is None else {"k_scale": scale, "v_scale": scale}
        facts = _attention_facts(16, 8, 32, 1, 8192, 2 if dtype is None else 1)

        def decode(config: Tile, cache: Any = cache, scales: Any = scales) -> list[Any]:
            return [lambda: flash_attention.call(bench.run, config, q, cache, cache, **scales)]

        seconds, config = bench.tuned(FLASH, facts, decode)
        plain = plain or seconds
        # Keys and values are one tensor here, read twice.
        bench.row(f"attention decode 8192, {kind} cache", seconds,
                  bytes=2.0 * cache.numel() * cache.element_size(), peer=plain,
                  against="the bf16 cache", note=config)  # fmt: skip


def _attention_facts(batch: int, heads: int, q_heads: int, rows: int, keys: int,
                     keysize: int) -> Problem:  # fmt: skip
    return problem("flash-attention", batch=batch, heads=heads, outputs=q_heads * 128, rows=rows,
                   keys=keys, width=128, keysize=keysize, itemsize=2, units=keys // 64)  # fmt: skip


def peak_of(call: Callable[[], Any]) -> float:
    """Bytes a call takes beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    del kept
    return float(taken)


def cross_entropy(bench: Bench) -> None:
    """Loss and gradients of 8192 tokens and 256 000 words beside logits in memory."""
    e, c = bf16(8192, 2304) * 0.1, bf16(256_000, 2304) * 0.1
    labels = torch.randint(0, 256_000, (8192,), device="cuda")

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
    forward = peak_of(lambda: cut_cross_entropy.forward(bench.run, e, c, labels))
    logits = peak_of(lambda: _functional.cross_entropy((e @ c.t()).float(), labels))
    note = f"loss takes {forward / 1e6:.1f} MB, with logits {logits / 1e6:.1f}"
    theirs = bench.seconds([dense], graph=False)
    bench.row("cross entropy, forward and backward", bench.seconds([ours], graph=False),
              peer=theirs, against="F.cross_entropy", note=note)  # fmt: skip


def flash_svd(bench: Bench) -> None:
    """BERT-base shapes: attention of rank 64 a head and a feed-forward block of rank 384."""
    pair = [(bf16(32, 12, 512, 64), bf16(12, 64, 64) * 0.1) for _ in range(3)]

    def dense() -> torch.Tensor:
        return flash_svd_attention.reference(pair[0], pair[1], pair[2])

    def ours() -> torch.Tensor:
        return flash_svd_attention.call(bench.run, pair[0], pair[1], pair[2])

    _beside(bench, "flash-svd attention", ours, dense)
    up, down = (bf16(16_384, 384), bf16(384, 3072) * 0.05), bf16(3072, 384) * 0.05
    _beside(bench, "flash-svd ffn", lambda: flash_svd_ffn.call(bench.run, up, down),
            lambda: flash_svd_ffn.reference(up, down))  # fmt: skip


def _beside(bench: Bench, name: str, ours: Callable[[], Any], dense: Callable[[], Any]) -> None:
    ours()
    note = f"takes {peak_of(ours) / 1e6:.1f} MB, dense {peak_of(dense) / 1e6:.1f}"
    bench.row(name, bench.seconds([ours]), peer=bench.seconds([dense]),
              against="the same factors, dense kernels", note=note)  # fmt: skip


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "weight-only": weight_only, "eight-bit": eight_bit, "attention": attention,
    "memory-bound": memory_bound, "cross-entropy": cross_entropy, "flash-svd": flash_svd,
    "formats": formats,
}  # fmt: skip


def correct(settings: Iterator[checked.Setting]) -> int:
    """Run every check; how many failed."""
    failed = 0
    for at in settings:
        for name, compute, limit in checked.checks(at):
            checked.poison(at.device)
            error = checked.error_of(*compute())
            wrong = not error <= limit
            failed += wrong
            if wrong or at.device == "cuda":
                word = "WRONG" if wrong else "right"
                print(f"{word} {str(at.dtype)[6:]:8} {name:44} {error:.1e} (limit {limit:.0e})",
                      flush=True)  # fmt: skip
    return failed


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop measuring")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--interpret", action="store_true", help="correctness only, on the CPU")
    options = parser.parse_args()
    if options.interpret:
        small = iter([checked.Setting(run_interpreted, "cpu", 32, torch.float32)])
        failed = correct(small)
        print(f"{failed} wrong in the interpreter")
        sys.exit(bool(failed))
    if not torch.cuda.is_available():
        sys.exit("no GPU here: --interpret checks the kernels on a CPU")
    bench = Bench(options.minutes)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, copy {bench.copy / 1e12:.2f} TB/s, "
          f"bf16 product {bench.rate / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
    failed = correct(checked.Setting(bench.run, "cuda", 256, t)
                     for t in (torch.bfloat16, torch.float16, torch.float32))  # fmt: skip
    skipped = []
    for section in options.only.split(","):
        if bench.is_over():
            skipped.append(section)
            continue
        try:
            SECTIONS[section](bench)
        except Exception as error:  # the other sections are still worth their time
            print(f"FAILED {section}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            skipped.append(section)
        torch.cuda.empty_cache()
    print(f"{failed} checks wrong; sections not finished: {', '.join(skipped) or 'none'}")
    if options.json:
        import triton

        data = {"device": name, "torch": torch.__version__, "triton": triton.__version__,
                "date": time.strftime("%Y-%m-%d"), "copy_bytes_per_second": bench.copy,
                "bf16_flops": bench.rate, "wrong": failed, "rows": bench.rows}  # fmt: skip
        options.json.write_text(json.dumps(data, indent=1))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
