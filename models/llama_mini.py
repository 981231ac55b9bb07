"""Llama-shaped decoder, 8 layers x 512: grouped queries, RoPE, RMSNorm, SwiGLU (untrained)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

from mopt.models._blocks import Decoder, SwiGLU
from mopt.models._entry import untrained

NAME = "llama-mini"
TRAINED = False

VOCABULARY = 32_000
CONTEXT = 1024


def make() -> nn.Module:
    return Decoder(
        vocabulary=VOCABULARY,
        context=CONTEXT,
        width=512,
        layers=8,
        heads=8,
        kv_heads=2,
        feed_forward=lambda: SwiGLU(512, 1408),
    )


def draw() -> tuple[Tensor]:
    return (torch.randint(VOCABULARY, (2, 128)),)


def dynamic_shapes() -> dict[str, dict[int, object]]:
    return {"ids": {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=CONTEXT)}}


MODEL = untrained(name=NAME, summary=__doc__, make=make, draw=draw, dynamic_shapes=dynamic_shapes)
