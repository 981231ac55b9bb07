"""BERT-shaped encoder, 6 layers of width 384, attention mask, mean pooling (untrained)."""

from __future__ import annotations

from torch import nn

from mopt.models._bert import Encoder, draw, dynamic_shapes
from mopt.models._entry import untrained

NAME = "bert"
TRAINED = False


def make() -> nn.Module:
    return Encoder(layers=6, width=384, heads=12)


MODEL = untrained(name=NAME, summary=__doc__, make=make, draw=draw, dynamic_shapes=dynamic_shapes)
