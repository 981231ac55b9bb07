"""A BERT-shaped encoder in two sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from mopt.models._blocks import init_residual_network

VOCABULARY = 30_522
CONTEXT = 512
LENGTH = 128


class Layer(nn.Module):
    """Post-LayerNorm encoder layer: masked self-attention, then a GELU feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = self.attention_norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.mlp_norm(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Token ids and attention mask, both int64 [B, T], to hidden states and their mean.

    Returns hidden [B, T, width] and pooled [B, width], the mean over the tokens whose mask is
    not 0. Every row of the mask needs at least one token.
    """

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        init_residual_network(self, layers)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.tokens(ids) + self.positions(positions))
        # ONNX Runtime's Attention does not broadcast a mask over the queries: [B, 1, T, T].
        allowed = attention_mask.bool()[:, None, None, :].expand(-1, -1, ids.shape[1], -1)
        for layer in self.layers:
            x = layer(x, allowed)
        weight = attention_mask.to(x.dtype)[:, :, None]
        return x, (x * weight).sum(1) / weight.sum(1)


def draw() -> tuple[Tensor, Tensor]:
    """Two rows; the second is padded after a random length."""
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, int(torch.randint(LENGTH // 4, LENGTH, ())) :] = 0
    return ids, mask


def dynamic_shapes() -> dict[str, dict[int, object]]:
    dims = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=CONTEXT)}
    return {"ids": dims, "attention_mask": dims}
