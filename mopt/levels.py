"""Tables of values for codes that are not evenly spaced: small floats, NF4, BitMoD.

A ``Levels`` holds one or more tables of the values that codes stand for, before the scale. Codes
of the small floats are those of the OCP and IEEE-style formats, so that hardware can read them;
their NaN and infinite codes stand for 0 here and are never written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Quantiles of the normal distribution, both ends and zero exact (Dettmers et al. 2023, "QLoRA",
# appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# One basic set and one value that each group picks (Chen et al. 2024, "BitMoD", section III).
_BITMOD4 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)
_BITMOD4_EXTRA = (10.0, -10.0, 16.0, -16.0)
_BITMOD3 = (0.0, 1.0, 2.0, 4.0, -1.0, -2.0, -4.0)
_BITMOD3_EXTRA = (3.0, -3.0, 6.0, -6.0)
# Evenly spaced logarithms: octaves between neighbours, and how far the negative side reaches.
_TWIN_LOG4 = ((0.45, 1.0), (0.45, 0.8), (0.7, 1.0), (0.7, 0.8))


@dataclass(frozen=True)
class Levels:
    """``tables`` (count, 2**bits) float32: the values of codes; a group picks one table."""

    bits: int
    tables: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each table."""
        return self.tables.abs().amax(1)


@cache
def levels(kind: str) -> Levels:
    """The levels of a kind: e4m3, e5m2, e2m1, e8m0, nf4, bitmod3, bitmod4 or twinlog4."""
    if kind == "e8m0":
        # The last code is NaN; the one before it is the largest power of two in float32.
        powers = 2.0 ** (torch.arange(256, dtype=torch.float64) - 127)
        powers[255] = 0
        return Levels(8, powers.float()[None])
    if kind in _FLOAT8:
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        values = codes.view(_FLOAT8[kind]).float()
        return Levels(8, values.nan_to_num(0, 0, 0)[None])
    if kind == "nf4":
        return Levels(4, torch.tensor([_NF4]))
    if kind == "e2m1":
        return Levels(4, torch.tensor([_E2M1 + tuple(-value for value in _E2M1)]))
    if kind == "bitmod4":
        return Levels(4, torch.tensor([(*_BITMOD4, extra) for extra in _BITMOD4_EXTRA]))
    if kind == "twinlog4":
        sizes = [[2.0 ** (-step * at) for at in range(8)] for step, _ in _TWIN_LOG4]
        return Levels(4, torch.tensor([
            positive + [-reach * value for value in positive]
            for positive, (_, reach) in zip(sizes, _TWIN_LOG4, strict=True)
        ]))  # fmt: skip
    assert kind == "bitmod3", kind
    return Levels(3, torch.tensor([(*_BITMOD3, extra) for extra in _BITMOD3_EXTRA]))


_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def nearest_codes(values: Tensor, kind: str, table: int = 0) -> Tensor:
    """The code of the level nearest to each value, int64; beyond the largest level, that one.

    Ties of the 8-bit floats go to the even code, other ties to the smaller level.
    """
    if kind in _FLOAT8:
        largest = float(levels(kind).largest[0])
        return values.clamp(-largest, largest).to(_FLOAT8[kind]).view(torch.uint8).long()
    row = levels(kind).tables[table]
    order = torch.argsort(row, stable=True)
    # Of two equal levels (zero with and without a sign) only the first is written.
    order = order[torch.cat([torch.tensor([True]), row[order].diff() > 0])]
    ordered = row[order]
    between = (ordered[1:] + ordered[:-1]) / 2
    return order[torch.bucketize(values.contiguous(), between)]
