"""GPT-2-shaped decoder, 12 layers of width 768, output tied to the embedding (untrained)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from mopt.models._blocks import init_residual_network
from mopt.models._entry import untrained

NAME = "gpt-12x768"
TRAINED = False

VOCABULARY = 50_257
CONTEXT = 1024
LENGTH = 512


class Attention(nn.Module):
    """Causal self-attention with biases; positions are in the input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Gpt(nn.Module):
    """Token ids [B, T] -> logits [B, T, vocabulary], T up to CONTEXT."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        init_residual_network(self, layers)
        # The head's scale, not the embedding's: logits have to stay O(1).
        self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def draw() -> tuple[Tensor]:
    return (torch.randint(VOCABULARY, (2, LENGTH)),)


def dynamic_shapes() -> dict[str, dict[int, object]]:
    return {"ids": {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=CONTEXT)}}


MODEL = untrained(name=NAME, summary=__doc__, make=Gpt, draw=draw, dynamic_shapes=dynamic_shapes)
