"""3-D U-Net for volumes: group norm, SiLU, residual blocks, trilinear upsampling (untrained)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from mopt.models._entry import untrained

NAME = "unet3d"
TRAINED = False

WIDTHS = (16, 32, 64, 128)
GROUPS = 8
CLASSES = 3


class Residual(nn.Module):
    """norm, SiLU, 3x3x3 convolution, twice, around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(GROUPS, channels_in)
        self.first = nn.Conv3d(channels_in, channels_out, 3, padding=1)
        self.second_norm = nn.GroupNorm(GROUPS, channels_out)
        self.second = nn.Conv3d(channels_out, channels_out, 3, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Conv3d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(F.silu(self.first_norm(x)))
        y = self.second(F.silu(self.second_norm(y)))
        return y + self.shortcut(x)


class UNet3d(nn.Module):
    """Volumes [B, 1, D, H, W] -> class logits [B, 3, D, H, W]; D, H and W multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, WIDTHS[0], 3, padding=1)
        widths = (WIDTHS[0], *WIDTHS)
        self.down = nn.ModuleList(Residual(a, b) for a, b in zip(widths, WIDTHS, strict=False))
        self.shrink = nn.ModuleList(nn.Conv3d(a, a, 3, stride=2, padding=1) for a in WIDTHS[:-1])
        steps = list(zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
        self.up = nn.ModuleList(Residual(a + b, b) for a, b in steps)
        self.norm = nn.GroupNorm(GROUPS, WIDTHS[0])
        self.head = nn.Conv3d(WIDTHS[0], CLASSES, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, volumes: Tensor) -> Tensor:
        skips = []
        x = self.down[0](self.stem(volumes))
        for shrink, level in zip(self.shrink, self.down[1:], strict=True):
            skips.append(x)
            x = level(shrink(x))
        for up in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)
            x = up(torch.cat((skips.pop(), x), dim=1))
        return self.head(F.silu(self.norm(x)))


def draw() -> tuple[Tensor]:
    return (torch.randn(2, 1, 32, 32, 32),)


def dynamic_shapes() -> dict[str, dict[int, object]]:
    return {"volumes": {0: Dim("batch", min=1, max=32)}}


MODEL = untrained(name=NAME, summary=__doc__, make=UNet3d, draw=draw, dynamic_shapes=dynamic_shapes)
