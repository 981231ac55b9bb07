"""Decoding packed weight codes in registers, shared by the kernels that read them.

Codes are *planar* (see ``mopt.backends.triton.planes``): plane ``p`` of a unit sits in bits
``p * bits`` of every byte, so that one shift and mask give a whole plane in order. On NVIDIA chips
four bytes are decoded at once in packed 16-bit arithmetic; elsewhere, and in the interpreter, by
the plain expression beside it, which means the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mopt.levels import levels


def _shifted(shift: int, mask: str, magic: str) -> str:
    """Four codes of one plane to four 16-bit floats ``magic + code``: shift, mask, two permutes."""
    move = f"shr.b32 a, $2, {shift}; and.b32 a, a, {mask};" if shift else f"and.b32 a, $2, {mask};"
    return (
        "{ .reg .b32 a; " + move + f" prmt.b32 $0, a, {magic}, 0x4140;"
        f" prmt.b32 $1, a, {magic}, 0x4342; }}"
    )


# A float of 16 bits whose exponent makes the last bit worth 1: codes are added by an OR.
_BF16, _FP16 = "0x43434343", "0x64646464"
_NIBBLES, _PAIRS = "0x0f0f0f0f", "0x03030303"


def _planes(bits: int, mask: str, magic: str) -> tl.constexpr:
    """The assembly of every plane of a byte."""
    return tl.constexpr(tuple(_shifted(shift, mask, magic) for shift in range(0, 8, bits)))


_INT4_BF16, _INT4_FP16 = _planes(4, _NIBBLES, _BF16), _planes(4, _NIBBLES, _FP16)
_INT2_BF16, _INT2_FP16 = _planes(2, _PAIRS, _BF16), _planes(2, _PAIRS, _FP16)


def table_assembly(values: tuple[int, ...]) -> str:
    """PTX that looks up sixteen 16-bit values for the eight codes in four bytes.

    Selecting bytes of a register by other registers' nibbles is a table of eight entries; the
    fourth bit of each code picks between two such tables. ``$0 $1`` get the values of the low
    nibbles in order, ``$2 $3`` those of the high ones, ``$4`` holds the codes.
    """

    def word(shift: int, first: int) -> str:
        total = 0
        for place in range(4):
            total |= ((values[first + place] >> shift) & 255) << (8 * place)
        return f"0x{total:08x}"

    lines = [
        ".reg .b32 s, u, m, h, l, a, b;",
        "and.b32 s, $4, 0x77777777; shr.b32 u, $4, 1; and.b32 u, u, 0x44444444;",
    ]
    for half in range(2):
        if half:
            lines.append("shr.b32 s, s, 16; shr.b32 u, u, 16;")
        lines.append("prmt.b32 m, 0, 0xffffffff, u;")
        for name, shift in (("h", 8), ("l", 0)):
            lines.append(f"prmt.b32 a, {word(shift, 0)}, {word(shift, 4)}, s;")
            lines.append(f"prmt.b32 b, {word(shift, 8)}, {word(shift, 12)}, s;")
            # (b & m) | (a & ~m)
            lines.append(f"lop3.b32 {name}, b, a, m, 0xe4;")
        lines.append(f"prmt.b32 ${half}, l, h, 0x6240; prmt.b32 ${2 + half}, l, h, 0x7351;")
    return "{ " + " ".join(lines) + " }"


def float_bits(kind: str, dtype: str) -> tuple[int, ...]:
    """The bits of a kind's first table in bf16 or fp16; code 15 of BitMoD stands for 0 here."""
    import torch

    values = levels(kind).tables[0].clone()
    if kind == "bitmod4":
        values[15] = 0
    wide = values.to(torch.bfloat16 if dtype == "bf16" else torch.float16)
    return tuple(int(v) & 0xFFFF for v in wide.view(torch.int16).tolist())


_KINDS = ("nf4", "e2m1", "bitmod4")
_LEVELS_BF16 = tl.constexpr(tuple(table_assembly(float_bits(k, "bf16")) for k in _KINDS))
_LEVELS_FP16 = tl.constexpr(tuple(table_assembly(float_bits(k, "fp16")) for k in _KINDS))
_NF4 = tl.constexpr(tuple(levels("nf4").tables[0].tolist()))
_E2M1 = tl.constexpr(tuple(levels("e2m1").tables[0].tolist()))
_BITMOD = tl.constexpr((*levels("bitmod4").tables[0].tolist()[:15], 0.0))


@triton.jit
def plane_of_ints(
    raw, PLANE: tl.constexpr, BITS: tl.constexpr, CT: tl.constexpr, ARCH: tl.constexpr
):
    """Plane ``PLANE`` of 2- or 4-bit codes in bytes, less the middle of their range, as floats."""
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    if ARCH >= 80 and ARCH < 200:
        if CT == tl.bfloat16:  # noqa: SIM300 - Triton compares so
            if BITS == 4:
                wide = tl.inline_asm_elementwise(
                    _INT4_BF16[PLANE], "=r,=r,r", [raw], tl.bfloat16, True, 4
                )
            else:
                wide = tl.inline_asm_elementwise(
                    _INT2_BF16[PLANE], "=r,=r,r", [raw], tl.bfloat16, True, 4
                )
            return wide - (128.0 + MIDDLE)
        else:
            if BITS == 4:
                wide = tl.inline_asm_elementwise(
                    _INT4_FP16[PLANE], "=r,=r,r", [raw], tl.float16, True, 4
                )
            else:
                wide = tl.inline_asm_elementwise(
                    _INT2_FP16[PLANE], "=r,=r,r", [raw], tl.float16, True, 4
                )
            return (wide - (1024.0 + MIDDLE)).to(CT)
    else:
        code = (raw.to(tl.int32) >> (PLANE * BITS)) & (2**BITS - 1)
        return (code - MIDDLE).to(tl.float32).to(CT)


@triton.jit
def plane_of_three_bits(pairs, single, PLANE: tl.constexpr, HALF: tl.constexpr, CT: tl.constexpr):
    """16 codes of 3 bits: two bits from plane ``PLANE`` of ``pairs``, the third from ``single``."""
    low = (pairs.to(tl.int32) >> (2 * PLANE)) & 3
    top = (single.to(tl.int32) >> (2 * PLANE + HALF)) & 1
    return (low + 4 * top - 4).to(tl.float32).to(CT)


@triton.jit
def small_float(raw, KIND: tl.constexpr, CT: tl.constexpr):
    """8-bit floats by moving their bits into a 16-bit float, exact with subnormals.

    The exponent's bias differs, which is one multiplication by a power of two.
    """
    wide = raw.to(tl.int32)
    sign = (wide & 128) << 8
    if CT == tl.bfloat16:  # noqa: SIM300 - Triton compares so
        if KIND == "e4m3":
            bits = (sign | ((wide & 127) << 4)).to(tl.uint16)
            value = bits.to(tl.bfloat16, bitcast=True) * 1.329227995784916e36  # 2**120
        else:
            bits = (sign | ((wide & 127) << 5)).to(tl.uint16)
            value = bits.to(tl.bfloat16, bitcast=True) * 5.192296858534828e33  # 2**112
    else:
        if KIND == "e4m3":
            bits = (sign | ((wide & 127) << 7)).to(tl.uint16)
            value = bits.to(tl.float16, bitcast=True) * 256.0
        else:
            value = (wide << 8).to(tl.uint16).to(tl.float16, bitcast=True)
    return value.to(CT)


@triton.jit
def _pick(code, TABLE: tl.constexpr, CT: tl.constexpr):
    """The entries of a table of sixteen, by four rounds of choosing between halves."""
    b0 = (code & 1) != 0
    b1 = (code & 2) != 0
    b2 = (code & 4) != 0
    b3 = (code & 8) != 0
    v0 = tl.where(b0, TABLE[1], TABLE[0])
    v1 = tl.where(b0, TABLE[3], TABLE[2])
    v2 = tl.where(b0, TABLE[5], TABLE[4])
    v3 = tl.where(b0, TABLE[7], TABLE[6])
    v4 = tl.where(b0, TABLE[9], TABLE[8])
    v5 = tl.where(b0, TABLE[11], TABLE[10])
    v6 = tl.where(b0, TABLE[13], TABLE[12])
    v7 = tl.where(b0, TABLE[15], TABLE[14])
    low = tl.where(b2, tl.where(b1, v3, v2), tl.where(b1, v1, v0))
    high = tl.where(b2, tl.where(b1, v7, v6), tl.where(b1, v5, v4))
    return tl.where(b3, high, low).to(CT)


@triton.jit
def planes_of_levels(raw, KIND: tl.constexpr, CT: tl.constexpr, ARCH: tl.constexpr):
    """Both planes of 4-bit codes that index a table: ``nf4``, ``e2m1`` or ``bitmod4``."""
    if ARCH >= 80 and ARCH < 200:
        TABLE: tl.constexpr = 0 if KIND == "nf4" else (1 if KIND == "e2m1" else 2)
        if CT == tl.bfloat16:  # noqa: SIM300 - Triton compares so
            low, high = tl.inline_asm_elementwise(
                _LEVELS_BF16[TABLE], "=r,=r,=r,=r,r", [raw], (tl.bfloat16, tl.bfloat16), True, 4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                _LEVELS_FP16[TABLE], "=r,=r,=r,=r,r", [raw], (tl.float16, tl.float16), True, 4
            )
        return low.to(CT), high.to(CT)
    else:
        code = raw.to(tl.int32)
        if KIND == "nf4":
            return _pick(code & 15, _NF4, CT), _pick(code >> 4, _NF4, CT)
        elif KIND == "e2m1":
            return _pick(code & 15, _E2M1, CT), _pick(code >> 4, _E2M1, CT)
        else:
            return _pick(code & 15, _BITMOD, CT), _pick(code >> 4, _BITMOD, CT)
