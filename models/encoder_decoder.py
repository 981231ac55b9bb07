"""Transformer with encoder and cross-attending decoder, 6 + 6 layers of width 512 (untrained)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from mopt.models._blocks import init_residual_network
from mopt.models._entry import untrained

NAME = "encoder-decoder"
TRAINED = False

VOCABULARY = 16_000
CONTEXT = 512
WIDTH, INNER, HEADS, LAYERS = 512, 2048, 8, 6


class Attention(nn.Module):
    """Queries from `x`, keys and values from `memory`; `allowed` is boolean, or None for causal."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (self.q(x), self.k(memory), self.v(memory))
        )
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=allowed is None
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = FeedForward()

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, allowed)
        return x + self.mlp(self.mlp_norm(x))


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.cross_norm = nn.LayerNorm(WIDTH)
        self.cross = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = FeedForward()

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, None)
        x = x + self.cross(self.cross_norm(x), memory, allowed)
        return x + self.mlp(self.mlp_norm(x))


class EncoderDecoder(nn.Module):
    """Source ids and mask int64 [B, S], target ids int64 [B, T] -> logits [B, T, vocabulary].

    The mask is 0 at padding. One embedding serves source, target and output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleList(EncoderLayer() for _ in range(LAYERS))
        self.encoder_norm = nn.LayerNorm(WIDTH)
        self.decoder = nn.ModuleList(DecoderLayer() for _ in range(LAYERS))
        self.decoder_norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("positions", sinusoids(CONTEXT, WIDTH), persistent=False)
        init_residual_network(self, LAYERS)
        # The head's scale, which `embed` undoes: logits have to stay O(1).
        self.tokens.weight = self.head.weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) * WIDTH**0.5 + self.positions[: ids.shape[1]]

    def forward(self, source: Tensor, source_mask: Tensor, target: Tensor) -> Tensor:
        allowed = source_mask.bool()[:, None, None, :]
        memory = self.embed(source)
        for layer in self.encoder:
            memory = layer(memory, allowed)
        memory = self.encoder_norm(memory)
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, memory, allowed)
        return self.head(self.decoder_norm(x))


def sinusoids(length: int, width: int) -> Tensor:
    """Fixed positions [length, width] (Vaswani et al. 2017, section 3.5, sines first)."""
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, 96 source and 64 target tokens; the second source is padded."""
    mask = torch.ones(2, 96, dtype=torch.int64)
    mask[1, int(torch.randint(24, 96, ())) :] = 0
    return torch.randint(VOCABULARY, (2, 96)), mask, torch.randint(VOCABULARY, (2, 64))


def dynamic_shapes() -> dict[str, dict[int, object]]:
    batch = Dim("batch", min=1, max=64)
    source = {0: batch, 1: Dim("source_length", min=2, max=CONTEXT)}
    target = {0: batch, 1: Dim("target_length", min=2, max=CONTEXT)}
    return {"source": source, "source_mask": source, "target": target}


MODEL = untrained(
    name=NAME, summary=__doc__, make=EncoderDecoder, draw=draw, dynamic_shapes=dynamic_shapes
)
