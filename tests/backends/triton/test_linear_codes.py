"""Weight-only linear in Triton's interpreter against what its operators mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopt.backends.triton.interpreter import run_interpreted
from mopt.backends.triton.kernels import linear_codes
from mopt.backends.triton.kernels._codes import float_bits, table_assembly
from mopt.backends.triton.kernels.linear_codes import BITS, PackedWeight
from mopt.backends.triton.launch import tile
from mopt.backends.triton.planes import pack_blocks, pack_levels, pack_planes, unpack_planes
from mopt.formats.base import Encoded, find_format
from mopt.formats.int_blocks import IntBlocks
from mopt.formats.level_blocks import LevelBlocks

FORMATS = (
    "int8-g32", "int8-g128-asym", "int8-channel", "int4-g16", "int4-g32-asym", "int4-g128",
    "int3-g32", "int3-g128", "int2-g32", "int2-g64-asym", "nf4", "nf4-g32", "mxfp4", "nvfp4",
    "bitmod4", "bitmod4-g32", "bitmod3", "fp8-e4m3", "fp8-e5m2",
)  # fmt: skip
# Sums in another order, relative to the largest output; 16-bit outputs are rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def packed(encoded: Encoded) -> PackedWeight:
    """An encoded weight as the kernel reads it."""
    found, columns = find_format(encoded.format), encoded.shape[1]
    tensors = encoded.tensors
    if isinstance(found, IntBlocks):
        return pack_blocks(
            tensors["codes"], tensors["scales"], tensors.get("zero_points"), found.storage, columns
        )
    assert isinstance(found, LevelBlocks)
    if found.kind == "bitmod3":
        return pack_blocks(tensors["codes"], tensors["scales"], None, 4, columns)
    return pack_levels(
        tensors["codes"], tensors["scales"], tensors.get("tables"), tensors.get("tensor_scale"),
        found.levels, found.scale_kind, columns,
    )  # fmt: skip


def computed(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, split: int = 1, bn: int = 32
) -> torch.Tensor:
    """The kernel's answer; the counters must be zeros again when it is done."""
    counters = torch.zeros(linear_codes.counters_needed(weight), dtype=torch.int32)
    config = tile(4, 2, BM=16, BN=bn, SPLIT=split)
    out = linear_codes.call(run_interpreted, config, x, weight, bias, counters)
    assert not counters.any()
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_means_what_its_operator_means(name: str) -> None:
    found = find_format(name)
    encoded = found.encode(torch.randn(20, 136))
    weight, exact = packed(encoded), found.decode(encoded).double()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, bias = torch.randn(3, 136).to(dtype), torch.randn(20).to(dtype)
        wanted = x.double() @ exact.t() + bias.double()
        error = (computed(x, weight, bias).double() - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCE[dtype], (name, dtype)


@settings(max_examples=12)
@given(
    name=st.sampled_from(("int4-g32", "int4-g64-asym", "int2-g64", "int8-g32", "nf4", "mxfp4")),
    rows=st.sampled_from((0, 1, 2, 15, 17)),
    outputs=st.sampled_from((1, 3, 31, 129)),
    columns=st.sampled_from((32, 65, 96, 130)),
    split=st.sampled_from((1, 2, 3)),
    dtype=st.sampled_from((torch.float32, torch.float16)),
)
def test_remainders_in_every_direction(
    name: str, rows: int, outputs: int, columns: int, split: int, dtype: torch.dtype
) -> None:
    found = find_format(name)
    encoded = found.encode(torch.randn(outputs, columns))
    weight = packed(encoded)
    x = torch.randn(rows, columns).to(dtype)
    out = computed(x, weight, None, min(split, weight.units), 64)
    wanted = x.double() @ found.decode(encoded).double().t()
    assert out.shape == wanted.shape and out.dtype == dtype
    if rows:
        limit = TOLERANCE[dtype] * float(wanted.abs().max()) + 1e-6
        assert float((out.double() - wanted).abs().max()) <= limit


def test_integers_are_exact_and_a_power_of_two_scales_exactly() -> None:
    codes = torch.randint(0, 16, (16, 4, 16), dtype=torch.uint8) * 17
    ones = torch.ones(16, 4)
    x = torch.randint(-8, 9, (4, 128)).float()
    weight = pack_blocks(codes, ones, None, 4, 128)
    exact = x @ (codes.repeat_interleave(2, -1).reshape(16, 128).float() % 16 - 8).t()
    assert torch.equal(computed(x, weight, None), exact)
    assert torch.equal(computed(4 * x, weight, None, split=2), 4 * exact)
    assert torch.equal(computed(x, pack_blocks(codes, 2 * ones, None, 4, 128), None), 2 * exact)


def test_the_parts_of_a_split_are_added_in_one_order() -> None:
    found = find_format("int4-g32")
    weight = packed(found.encode(torch.randn(16, 256)))
    x = torch.randn(2, 256)
    assert torch.equal(computed(x, weight, None, 4), computed(x, weight, None, 4))


@pytest.mark.parametrize(("bits", "unit"), [(8, 32), (4, 32), (4, 128), (3, 128), (2, 64)])
def test_planes_come_back(bits: int, unit: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 3 * unit))
    codes[0], codes[1] = 0, 2**bits - 1
    data, top = pack_planes(codes, bits, unit)
    assert data.numel() + (top.numel() if top is not None else 0) == codes.numel() * bits // 8
    assert torch.equal(unpack_planes(data, bits, unit, top), codes.to(torch.int32))


def test_a_weight_of_three_bits_takes_three_bits() -> None:
    weight = packed(find_format("int3-g128").encode(torch.randn(128, 256)))
    assert weight.kind == "int3" and weight.top is not None
    assert weight.codes.numel() + weight.top.numel() == 128 * 256 * 3 // 8


def prmt(a: int, b: int, selector: int) -> int:
    """PTX's byte permute: nibbles of the selector pick among the eight bytes of b:a."""
    pool = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    return sum(pool[(selector >> 4 * i) & 7] << 8 * i for i in range(4))


def run_ptx(text: str, word: int, result_count: int) -> list[int]:
    """Emulates the few PTX instructions that decoding is made of."""
    registers: dict[str, int] = {f"${result_count}": word}

    def value(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else registers[name]

    for line in text.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *operands = [part.strip() for part in rest.split(",")]
        v = [value(part) for part in operands]
        if name == "and.b32":
            found = v[0] & v[1]
        elif name == "shr.b32":
            found = v[0] >> v[1]
        elif name == "prmt.b32":
            found = prmt(v[0], v[1], v[2] & 0xFFFF)
        else:
            assert name == "lop3.b32", line
            # Bit i of the table is the result for the three operands' bits in i.
            places = [sum(((v[k] >> bit) & 1) << (2 - k) for k in range(3)) for bit in range(32)]
            found = sum(((v[3] >> place) & 1) << bit for bit, place in enumerate(places))
        registers[target] = found & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(result_count)]


@pytest.mark.parametrize("kind", ["nf4", "e2m1", "bitmod4"])
def test_tables_in_ptx_hold_the_values_of_all_codes(kind: str) -> None:
    for dtype in ("bf16", "fp16"):
        bits = float_bits(kind, dtype)
        text = table_assembly(bits)
        for word in torch.randint(0, 2**31, (50,)).tolist():
            found = run_ptx(text, word, 4)
            codes = [(word >> 8 * i) & 255 for i in range(4)]
            halves = [(found[i // 2] >> 16 * (i % 2)) & 0xFFFF for i in range(8)]
            assert halves[:4] == [bits[c & 15] for c in codes]
            assert halves[4:] == [bits[c >> 4] for c in codes]


@pytest.mark.parametrize(("bits", "planes"), [(4, 2), (2, 4)])
def test_integers_in_ptx_are_magic_numbers_plus_codes(bits: int, planes: int) -> None:
    from mopt.backends.triton.kernels import _codes

    for plane in range(planes):
        for dtype, magic in (("BF16", 0x4300), ("FP16", 0x6400)):
            text = getattr(_codes, f"_INT{bits}_{dtype}").value[plane]
            for word in torch.randint(0, 2**31, (20,)).tolist():
                found = run_ptx(text, word, 2)
                halves = [(found[i // 2] >> 16 * (i % 2)) & 0xFFFF for i in range(4)]
                codes = [(word >> (8 * i + bits * plane)) & (2**bits - 1) for i in range(4)]
                assert halves == [magic | code for code in codes]


def test_every_kind_says_its_bits() -> None:
    assert {packed(find_format(n).encode(torch.randn(4, 128))).kind for n in FORMATS} == set(BITS)
