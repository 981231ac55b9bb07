"""Vision transformer ViT-S/16 at 224 pixels: 12 layers of width 384, one qkv layer (untrained)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from mopt.models._blocks import init_residual_network
from mopt.models._entry import untrained

NAME = "vit"
TRAINED = False

SIDE = 224
PATCH = 16
CLASSES = 1000


class Block(nn.Module):
    """Pre-LayerNorm block; queries, keys and values come from one linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class VisionTransformer(nn.Module):
    """Images [B, 3, 224, 224] -> logits [B, 1000], read from a class token."""

    def __init__(self, layers: int = 12, width: int = 384, heads: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (SIDE // PATCH) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, CLASSES)
        init_residual_network(self, layers)
        nn.init.normal_(self.patches.weight, std=(3 * PATCH**2) ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def draw() -> tuple[Tensor]:
    return (torch.randn(2, 3, SIDE, SIDE),)


def dynamic_shapes() -> dict[str, dict[int, object]]:
    return {"images": {0: Dim("batch", min=1, max=256)}}


MODEL = untrained(
    name=NAME, summary=__doc__, make=VisionTransformer, draw=draw, dynamic_shapes=dynamic_shapes
)
