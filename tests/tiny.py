"""Small modules for tests. Every function returns a fresh Sample with seeded weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from tests.case import Sample


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A standard normal tensor that depends on nothing but its arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def sample(
    module: nn.Module,
    *inputs: Tensor,
    dynamic: bool = False,
    seed: int = 0,
    scale: float | None = None,
) -> Sample:
    """``module`` with every floating-point weight and buffer drawn anew.

    Weights become normal with a deviation of ``scale`` (default 1/sqrt(fan in), and around 1 for
    vectors called weight), running variances uniform in 0.5 to 1.5. ``dynamic`` makes the first
    dimension of every input one dynamic batch.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.dim() < 2:
                tensor.copy_(noise * 0.2 + (1.0 if name.endswith("weight") else 0.0))
            else:
                fan_in = tensor[0].numel()
                tensor.copy_(noise * (fan_in**-0.5 if scale is None else scale))
    batch = Dim("batch")
    shapes = tuple({0: batch} for _ in inputs) if dynamic else None
    return Sample(module, inputs, shapes)


class Apply(nn.Module):
    """A module whose forward is ``function(self, x)`` or ``function(self, x, y)``.

    ``members`` are its weights (parameters), buffers (other tensors) and parts (modules).
    """

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, nn.Module):
                self.add_module(name, member)
            elif isinstance(member, nn.Parameter):
                self.register_parameter(name, member)
            else:
                self.register_buffer(name, member)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        """What the function returns."""
        return self.function(self, x) if y is None else self.function(self, x, y)


def linear(in_features: int = 8, out_features: int = 4, *, bias: bool = True) -> Sample:
    """One linear layer, dynamic batch."""
    return sample(
        nn.Linear(in_features, out_features, bias=bias), normal(3, in_features), dynamic=True
    )


def mlp(width: int = 16, hidden: int = 32) -> Sample:
    """linear, gelu, linear; dynamic batch."""
    layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    return sample(layers, normal(4, width), dynamic=True)


def conv_bn_relu(channels: int = 8, *, groups: int = 1, bias: bool = False) -> Sample:
    """conv2d, batch_norm, relu; dynamic batch."""
    layers = nn.Sequential(
        nn.Conv2d(4, channels, 3, padding=1, groups=groups, bias=bias),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
    return sample(layers, normal(2, 4, 6, 6), dynamic=True)


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm and a shortcut, as in ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (N, channels, H, W), returned in the same shape."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


def small_cnn(channels: int = 8, classes: int = 10) -> Sample:
    """Stem, two residual blocks, pooling and a classifier; dynamic batch."""
    layers = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        ResidualBlock(channels),
        ResidualBlock(channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )
    return sample(layers, normal(2, 3, 8, 8), dynamic=True)


class RmsNorm(nn.Module):
    """RMS norm written out as Hugging Face's Llama writes it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.compute = torch.float32

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalised in ``compute``, scaled in the dtype of the input."""
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(self.compute)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return self.weight * hidden_states.to(dtype)


class Attention(nn.Module):
    """Causal self-attention with separate q, k, v and, optionally, fewer key heads."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (N, T, width), returned in the same shape."""
        n, t, _ = x.shape
        q = self.q_proj(x).view(n, t, self.heads, self.head).transpose(1, 2)
        k = self.k_proj(x).view(n, t, self.kv_heads, self.head).transpose(1, 2)
        v = self.v_proj(x).view(n, t, self.kv_heads, self.head).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.o_proj(y.transpose(1, 2).reshape(n, t, -1))


class DecoderBlock(nn.Module):
    """A Llama-like block: RMS norm, grouped attention, gated feed-forward."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(width)
        self.attention = Attention(width, heads, kv_heads)
        self.norm2 = RmsNorm(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (N, T, width), returned in the same shape."""
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A two-block language model whose head is tied to its embedding."""

    def __init__(self, vocabulary: int, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            DecoderBlock(width, heads, kv_heads, 2 * width) for _ in range(2)
        )
        self.norm = RmsNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, T, vocabulary) for tokens (N, T)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def decoder(vocabulary: int = 64, width: int = 32, heads: int = 4, kv_heads: int = 2) -> Sample:
    """A tiny Llama-like language model with grouped attention and a tied head; dynamic batch."""
    tokens = torch.arange(2 * 6).remainder(vocabulary).reshape(2, 6)
    return sample(Decoder(vocabulary, width, heads, kv_heads), tokens, dynamic=True)


def embedding(rows: int = 16, width: int = 8) -> Sample:
    """One embedding table looked up by (2, 5) indices; dynamic batch."""
    indices = torch.arange(10).remainder(rows).reshape(2, 5)
    return sample(nn.Embedding(rows, width), indices, dynamic=True)


def add_two_weights() -> Sample:
    """x * (a + b) with weights a and b."""
    return sample(
        Apply(
            lambda m, x: x * (m.a + m.b),
            a=nn.Parameter(torch.ones(4)),
            b=nn.Parameter(torch.ones(4)),
        ),
        normal(3, 4),
        dynamic=True,
    )


def add_weight_to_input() -> Sample:
    """x + a with one weight."""
    return sample(
        Apply(lambda m, x: x + m.a, a=nn.Parameter(torch.ones(4))), normal(3, 4), dynamic=True
    )


def outer(size: int) -> Sample:
    """x + outer(a, a): a result ``size`` times larger than the weight."""
    return sample(
        Apply(lambda m, x: x + torch.outer(m.a, m.a), a=nn.Parameter(torch.ones(size))),
        normal(size, size),
    )
