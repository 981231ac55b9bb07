"""ResNet-50 at 224 pixels: bottleneck blocks with batch norm (untrained)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from mopt.models._convolution import ConvNorm, settle
from mopt.models._entry import untrained

NAME = "resnet50"
TRAINED = False

SIDE = 224
CLASSES = 1000
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the stride sits on the 3x3 (version 1.5)."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels_out = EXPANSION * width
        self.reduce = ConvNorm(channels_in, width, 1)
        self.spatial = ConvNorm(width, width, 3, stride=stride)
        self.expand = ConvNorm(width, channels_out, 1, activation=None)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = ConvNorm(channels_in, channels_out, 1, stride=stride, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.expand(self.spatial(self.reduce(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """Images [B, 3, 224, 224] -> logits [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 64, 7, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        channels = 64
        for stage, (width, count) in enumerate(STAGES):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(channels, width, stride))
                channels = EXPANSION * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.stem(images)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def make() -> nn.Module:
    return settle(ResNet(), torch.randn(8, 3, 96, 96))


def draw() -> tuple[Tensor]:
    return (torch.randn(2, 3, SIDE, SIDE),)


def dynamic_shapes() -> dict[str, dict[int, object]]:
    return {"images": {0: Dim("batch", min=1, max=256)}}


MODEL = untrained(name=NAME, summary=__doc__, make=make, draw=draw, dynamic_shapes=dynamic_shapes)
