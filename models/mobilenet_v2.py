"""MobileNetV2 at 224 pixels: inverted residuals with depthwise convolutions, ReLU6 (untrained)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from mopt.models._convolution import ConvNorm, settle
from mopt.models._entry import untrained

NAME = "mobilenet-v2"
TRAINED = False

SIDE = 224
CLASSES = 1000
# Expansion, channels, blocks, stride of the first block (Sandler et al. 2018, table 2).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where the shape is kept."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNorm(channels_in, inner, 1, activation=nn.ReLU6))
        layers.append(ConvNorm(inner, inner, 3, stride=stride, groups=inner, activation=nn.ReLU6))
        layers.append(ConvNorm(inner, channels_out, 1, activation=None))
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.has_shortcut else self.layers(x)


class MobileNet(nn.Module):
    """Images [B, 3, 224, 224] -> logits [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, stride=2, activation=nn.ReLU6)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, width, count, first_stride in STAGES:
            for index in range(count):
                stride = first_stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, width, stride, expansion))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.last = ConvNorm(channels, 1280, 1, activation=nn.ReLU6)
        self.head = nn.Linear(1280, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(images)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def make() -> nn.Module:
    return settle(MobileNet(), torch.randn(8, 3, 96, 96))


def draw() -> tuple[Tensor]:
    return (torch.randn(2, 3, SIDE, SIDE),)


def dynamic_shapes() -> dict[str, dict[int, object]]:
    return {"images": {0: Dim("batch", min=1, max=256)}}


MODEL = untrained(name=NAME, summary=__doc__, make=make, draw=draw, dynamic_shapes=dynamic_shapes)
