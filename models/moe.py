"""Mixture-of-experts decoder, 2 of 8 experts per token, all experts computed (untrained)."""

from __future__ import annotations

from torch import nn

from mopt.models import _moe
from mopt.models._entry import untrained

NAME = "moe"
TRAINED = False


def make() -> nn.Module:
    return _moe.make(_moe.DenseExperts)


MODEL = untrained(
    name=NAME,
    summary=__doc__,
    make=make,
    draw=_moe.draw,
    dynamic_shapes=_moe.dynamic_shapes,
)
