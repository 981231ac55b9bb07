"""Mixture-of-experts decoder of `moe`, experts compute only their own tokens (untrained)."""

from __future__ import annotations

from torch import nn

from mopt.models import _moe
from mopt.models._entry import untrained

NAME = "moe-gather"
TRAINED = False


def make() -> nn.Module:
    return _moe.make(_moe.GatherExperts)


MODEL = untrained(
    name=NAME,
    summary=__doc__,
    make=make,
    draw=_moe.draw,
    dynamic_shapes=_moe.dynamic_shapes,
)
