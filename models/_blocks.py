"""Layers that several decoder models of the zoo share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rope_tables(length: int, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each [length, head_dim], both halves repeated."""
    rates = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 34, with the two halves as pairs).

    x [.., T, head_dim]; cos, sin [T, head_dim].
    """
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with three linear layers without bias."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class RotaryAttention(nn.Module):
    """Causal self-attention with rotary positions; `kv_heads` < `heads` shares keys and values."""

    def __init__(self, width: int, heads: int, kv_heads: int | None = None) -> None:
        super().__init__()
        self.head_dim = width // heads
        kv_width = (kv_heads or heads) * self.head_dim
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_width, bias=False)
        self.v = nn.Linear(width, kv_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.grouped = kv_width != width

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            is_causal=True,
            enable_gqa=self.grouped,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Pre-RMSNorm residual block: rotary attention, then the given feed-forward module."""

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: nn.Module,
        kv_heads: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = RotaryAttention(width, heads, kv_heads)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-5)
        self.mlp = feed_forward
        # Identity instead of Dropout(0) keeps no-op nodes out of captured graphs.
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """A Llama-shaped language model: token ids [B, T] -> logits [B, T, vocabulary].

    `feed_forward` makes one feed-forward module per layer. T may be anything up to `context`.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        context: int,
        width: int,
        layers: int,
        heads: int,
        feed_forward: Callable[[], nn.Module],
        kv_heads: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            DecoderBlock(width, heads, feed_forward(), kv_heads, dropout) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        cos, sin = rope_tables(context, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        init_residual_network(self, layers)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.dropout(self.embedding(ids))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def init_residual_network(module: nn.Module, layers: int) -> None:
    """Weights of a pre-norm transformer so that the residual stream and the logits stay O(1).

    Linear layers get variance 1/fan_in; layers named `out` and `down`, which write to the residual
    stream, are scaled by 1/sqrt(2 layers) (Radford et al. 2019, section 2.3). Biases are zero and
    embeddings unit normal.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            scale = (2 * layers) ** -0.5 if name.endswith((".out", ".down")) else 1.0
            nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight)
