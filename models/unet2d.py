"""2-D U-Net for segmentation: batch norm, transposed convolutions, skips (untrained)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

from mopt.models._convolution import ConvNorm, settle
from mopt.models._entry import untrained

NAME = "unet2d"
TRAINED = False

WIDTHS = (32, 64, 128, 256, 512)
CLASSES = 4


def pair(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(
        ConvNorm(channels_in, channels_out, 3), ConvNorm(channels_out, channels_out, 3)
    )


class UNet2d(nn.Module):
    """Images [B, 3, H, W] -> class logits [B, 4, H, W]; H and W multiples of 16."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *WIDTHS)
        self.down = nn.ModuleList(pair(a, b) for a, b in zip(widths, WIDTHS, strict=False))
        self.pool = nn.MaxPool2d(2)
        steps = list(zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in steps)
        self.up = nn.ModuleList(pair(2 * b, b) for _, b in steps)
        self.head = nn.Conv2d(WIDTHS[0], CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        skips = []
        x = self.down[0](images)
        for level in self.down[1:]:
            skips.append(x)
            x = level(self.pool(x))
        for grow, up in zip(self.grow, self.up, strict=True):
            x = up(torch.cat((skips.pop(), grow(x)), dim=1))
        return self.head(x)


def make() -> nn.Module:
    return settle(UNet2d(), torch.randn(4, 3, 64, 64))


def draw() -> tuple[Tensor]:
    return (torch.randn(2, 3, 128, 128),)


def dynamic_shapes() -> dict[str, dict[int, object]]:
    height, width = Dim("height", min=1, max=64), Dim("width", min=1, max=64)
    return {"images": {0: Dim("batch", min=1, max=64), 2: 16 * height, 3: 16 * width}}


MODEL = untrained(name=NAME, summary=__doc__, make=make, draw=draw, dynamic_shapes=dynamic_shapes)
