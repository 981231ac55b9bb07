"""Arithmetic that Triton's own operations do not give the same everywhere."""

from __future__ import annotations

import triton
import triton.language as tl

from mopt.backends.triton.kernels._codes import small_float


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even, for magnitudes below 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantized(x, KIND: tl.constexpr, ARCH: tl.constexpr):
    """Values within the range of ``int8`` (127) or ``e4m3`` (448), as bytes."""
    if KIND == "int8":
        return tl.minimum(tl.maximum(round_even(x), -127.0), 127.0).to(tl.int8)
    else:
        return e4m3_bits(x, ARCH)


@triton.jit
def limit_of(KIND: tl.constexpr):
    """The largest magnitude of a kind of 8-bit numbers."""
    if KIND == "int8":
        return 127.0
    else:
        return 448.0


@triton.jit
def e4m3_bits(x, ARCH: tl.constexpr):
    """The nearest 8-bit float (e4m3), ties to even, saturating, as a byte.

    Chips from sm_89 on have an instruction; elsewhere, and where the interpreter's cast is wrong,
    the bits are rounded as integers: normals by carrying into the kept bits, subnormals (below
    2**-6, multiples of 2**-9) by adding 1.5 * 2**23 to 512 times the magnitude.
    """
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if ARCH >= 89 and ARCH < 200:
        return x.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        shifted = tl.abs(x) * 512.0 + 12582912.0
        small = shifted.to(tl.int32, bitcast=True) & 255
        code = tl.where(tl.abs(x) < 0.015625, small, normal)
        sign = (bits >> 24) & 128
        return (code | sign).to(tl.uint8).to(tl.int8, bitcast=True)


@triton.jit
def product_of_bytes(a, b, acc, KIND: tl.constexpr, BK: tl.constexpr, ARCH: tl.constexpr):
    """``acc + a @ b`` of 8-bit operands: int32 sums of integers, fp32 sums of floats."""
    if KIND == "int8":
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    elif ARCH >= 89 and ARCH < 200:
        x = a.to(tl.float8e4nv, bitcast=True)
        y = b.to(tl.float8e4nv, bitcast=True)
        # Hopper adds fp8 products in fewer bits; those of a tile, at most 128, go to full sums.
        return tl.dot(x, y, acc, max_num_imprecise_acc=BK)
    else:
        x = small_float(a.to(tl.uint8, bitcast=True), "e4m3", tl.float16)
        y = small_float(b.to(tl.uint8, bitcast=True), "e4m3", tl.float16)
        return tl.dot(x, y, acc)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def activated(x, KIND: tl.constexpr):
    """An activation by name: none, relu, silu, or gelu (exact, by the error function)."""
    if KIND == "relu":
        return tl.maximum(x, 0.0)
    elif KIND == "silu":
        return x * sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return x
