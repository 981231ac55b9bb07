"""A small MobileNet-style net, trained on scikit-learn's digits in well under a minute.

Inverted residuals (1x1 expansion, 3x3 depthwise, linear 1x1 projection, Sandler et al. 2018) with
ReLU on 8x8 images. ``spread`` starts the training from channels of unequal size: each batch norm
in front of a ReLU begins with factors drawn log-uniformly from 1/spread to spread, and the layer
behind it with their inverse, which is the same function; training goes on from there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.models import digits_cnn

# Expansion, channels, stride.
STAGES = ((4, 16, 1), (4, 24, 2), (4, 24, 1), (4, 32, 1))
_STEM, _LAST, _CLASSES = 16, 64, 10


def _conv(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection, a shortcut where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand, self.expand_norm = _conv(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.depthwise = _conv(inner, inner, 3, stride=stride, groups=inner)
        self.depthwise_norm = nn.BatchNorm2d(inner)
        self.project, self.project_norm = _conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W)."""
        y = F.relu(self.expand_norm(self.expand(x)))
        y = F.relu(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.has_shortcut else y


class MobileDigits(nn.Module):
    """Images (B, 1, 8, 8), values 0 to 1, to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = _conv(1, _STEM, 3), nn.BatchNorm2d(_STEM)
        blocks, channels = [], _STEM
        for expansion, width, stride in STAGES:
            blocks.append(InvertedResidual(channels, width, stride, expansion))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.last, self.last_norm = _conv(channels, _LAST, 1), nn.BatchNorm2d(_LAST)
        self.head = nn.Linear(_LAST, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        x = self.blocks(F.relu(self.stem_norm(self.stem(images))))
        x = F.relu(self.last_norm(self.last(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@torch.no_grad()
def _start_unequal(net: MobileDigits, spread: float, random: torch.Generator) -> None:
    """Factors on batch norms in front of a ReLU and their inverse on the layer behind it."""
    for block in net.blocks:
        assert isinstance(block, InvertedResidual)
        for norm, behind in (
            (block.expand_norm, block.depthwise), (block.depthwise_norm, block.project),
        ):  # fmt: skip
            factors = spread ** (2 * torch.rand(len(norm.weight), generator=random) - 1)
            norm.weight *= factors
            shape = (-1, 1, 1, 1) if behind is block.depthwise else (1, -1, 1, 1)
            behind.weight /= factors.view(shape)  # type: ignore[operator, union-attr]


def train(seed: int, *, spread: float = 1.0, epochs: int = 20) -> nn.Module:
    """The trained net in eval mode; the same seed gives the same net."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    net = MobileDigits()
    if spread > 1:
        _start_unequal(net, spread, random)
    images, labels = digits_cnn.split("training")
    steps = epochs * -(-len(images) // 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=random).split(64):
            loss = F.cross_entropy(net(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return net.eval()
