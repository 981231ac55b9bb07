"""Every kernel at a size it is meant for: what the tests compile and the documentation lists.

    for entry in catalogue():
        for launch in entry.launches():
            compile_launch(launch, ARCHITECTURES["sm_90"])

Tensors are on the ``meta`` device: nothing is allocated and nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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
from mopt.backends.triton.launch import Launch, Recorder, Runner, Tile, tile

# The others differ from these in how codes are decoded, not in the tiles for many rows.
_LARGE = ("int8", "int4", "nf4")
# Columns that share a scale where that is not 128; 0 is a whole row.
GROUPS = {"nf4": 64, "e2m1": 32, "e4m3": 0, "e5m2": 0}


@dataclass(frozen=True)
class Entry:
    """A kernel with a size: ``run`` makes its launches."""

    name: str
    run: Callable[[Runner], object]

    def launches(self) -> list[Launch]:
        """The launches of one call."""
        recorder = Recorder()
        self.run(recorder)
        return list(recorder.launches.values())


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def empty_weight(kind: str, outputs: int, columns: int, group: int) -> PackedWeight:
    """A packed weight without storage."""
    unit = group or 128
    bits = 2 if kind == "int3" else BITS[kind]
    groups = columns // group if group else 1
    scales = empty(groups, outputs)
    return PackedWeight(
        kind, outputs, columns, group, unit,
        empty(outputs, columns * bits // 8, dtype=torch.uint8), scales,
        extra=scales if kind == "bitmod4" else None,
        top=empty(outputs, columns // 8, dtype=torch.uint8) if kind == "int3" else None,
    )  # fmt: skip


def catalogue() -> Iterator[Entry]:
    """All kernels, bf16 inputs, in the order of the documentation."""
    for kind in BITS:
        weight = empty_weight(kind, 4096, 4096, GROUPS.get(kind, 128))
        yield _codes(f"linear-codes {kind}, 16 rows", weight, 16, tile(4, 3, BM=16, BN=64, SPLIT=4))
        if kind in _LARGE:
            large = tile(8, 2, BM=128, BN=64, SPLIT=1)
            yield _codes(f"linear-codes {kind}, 4096 rows", weight, 4096, large)
    for kind, dtype in (("int8", torch.int8), ("e4m3", torch.uint8)):
        yield _bytes(f"linear-bytes {kind}", dtype, dtype)
    yield _bytes("linear-bytes uint8 by int8", torch.uint8, torch.int8)
    x, wide = empty(512, 4096), empty(4096)
    yield Entry("quantize-tensor", lambda run: quantize_tensor.call(run, x))
    for kind in ("int8", "e4m3"):
        yield Entry(
            f"norm-quantize {kind}",
            lambda run, kind=kind: norm_quantize.call(run, x, wide, 1e-5, kind),  # type: ignore[misc]
        )
    step, zero = empty(1, dtype=torch.float32), empty(1, dtype=torch.uint8)
    yield Entry(
        "norm-quantize, layer norm, known range",
        lambda run: norm_quantize.call_static(
            run, x, wide, 1e-5, step, zero, bias=wide, centered=True
        ),
    )
    rank = tile(4, 3, BM=64, BN=64, BK=64, SPLIT=4)
    inner, outer = empty(128, 4096), empty(4096, 128)
    yield Entry(
        "linear-low-rank 128", lambda run: linear_low_rank.call(run, rank, x, inner, outer, None)
    )
    yield from _attention()
    yield from _training(x, wide)
    yield from _flash_svd()


def _codes(name: str, weight: PackedWeight, rows: int, config: Tile) -> Entry:
    counters = empty(linear_codes.counters_needed(weight), dtype=torch.int32)
    x = empty(rows, weight.columns)
    return Entry(name, lambda run: linear_codes.call(run, config, x, weight, None, counters))


def _bytes(name: str, left_type: torch.dtype, right_type: torch.dtype) -> Entry:
    a, b = empty(4096, 4096, dtype=left_type), empty(4096, 4096, dtype=right_type)
    left, right = empty(4096, dtype=torch.float32), empty(4096, dtype=torch.float32)
    config = tile(8, 3, BM=128, BN=64, BK=64)
    return Entry(name, lambda run: linear_bytes.call(run, config, a, b, left, right, None, 4096))


def _attention() -> Iterator[Entry]:
    q, k = empty(2, 32, 2048, 128), empty(2, 8, 2048, 128)
    prefill = tile(8, 2, BM=128, BN=64, SPLIT=1)
    yield Entry(
        "flash-attention prefill",
        lambda run: flash_attention.call(run, prefill, q, k, k, causal=True),
    )
    padding = empty(2, 1, 1, 2048, dtype=torch.bool)
    yield Entry(
        "flash-attention padding mask",
        lambda run: flash_attention.call(run, prefill, q, k, k, mask=padding),
    )
    one, decode = empty(2, 32, 1, 128), tile(4, 3, BM=16, BN=64, SPLIT=8)
    yield Entry("flash-attention decode", lambda run: flash_attention.call(run, decode, one, k, k))
    scale = empty(2, 8, 2048, dtype=torch.float32)
    for kind, dtype in (("int8", torch.int8), ("e4m3", torch.uint8)):
        cache = empty(2, 8, 2048, 128, dtype=dtype)
        yield Entry(
            f"flash-attention decode {kind}",
            lambda run, cache=cache: flash_attention.call(  # type: ignore[misc]
                run, decode, one, cache, cache, k_scale=scale, v_scale=scale
            ),
        )


def _training(x: Tensor, weight: Tensor) -> Iterator[Entry]:
    rstd, angle = empty(512, dtype=torch.float32), empty(512, 64, dtype=torch.float32)
    heads = empty(512, 32, 128)
    yield Entry("rms-norm", lambda run: rms_norm.forward(run, x, weight, 1e-5, x))
    yield Entry("rms-norm backward", lambda run: rms_norm.backward(run, x, x, weight, rstd))
    yield Entry("rotary", lambda run: rotary.call(run, heads, angle, angle))
    yield Entry("swiglu", lambda run: swiglu.forward(run, x, x))
    yield Entry("swiglu backward", lambda run: swiglu.backward(run, x, x, x))
    for kind in saved_activations.KINDS:
        size = x.numel() // (2 if kind == "int4" else 1)
        codes, scale = empty(size, dtype=torch.int8), empty(x.numel() // 128, dtype=torch.float32)
        yield Entry(
            f"saved-activations {kind}",
            lambda run, kind=kind: saved_activations.compress(run, x, kind),  # type: ignore[misc]
        )
        yield Entry(
            f"saved-activations {kind}, back",
            lambda run, kind=kind, codes=codes, scale=scale: saved_activations.restore(  # type: ignore[misc]
                run, codes, scale, x, kind
            ),
        )
    e, c = empty(8192, 2304), empty(256_000, 2304)
    labels = empty(8192, dtype=torch.int64)
    sums = empty(8192, dtype=torch.float32)
    yield Entry("cut-cross-entropy", lambda run: cut_cross_entropy.forward(run, e, c, labels))
    yield Entry(
        "cut-cross-entropy backward",
        lambda run: cut_cross_entropy.backward(run, sums, e, c, labels, sums),
    )


def _flash_svd() -> Iterator[Entry]:
    pair = (empty(32, 12, 512, 64), empty(12, 64, 64))
    yield Entry("flash-svd attention", lambda run: flash_svd_attention.call(run, pair, pair, pair))
    up, down = (empty(16_384, 384), empty(384, 3072)), empty(3072, 384)
    yield Entry("flash-svd ffn", lambda run: flash_svd_ffn.call(run, up, down))
