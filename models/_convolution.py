"""What the convolutional models of the zoo share: conv with batch norm, and sane statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, and an activation unless `activation` is None.

    Padding keeps the size at stride 1. `dimensions` is 2 or 3.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        dimensions: int = 2,
        activation: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        conv, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dimensions]
        layers: list[nn.Module] = [
            conv(
                channels_in,
                channels_out,
                kernel,
                stride=stride,
                padding=kernel // 2,
                groups=groups,
                bias=False,
            ),
            norm(channels_out),
        ]
        if activation is not None:
            layers.append(activation())
        super().__init__(*layers)


@torch.no_grad()
def settle(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """Give an untrained network the statistics of a trained one.

    Convolutions get He's variance, batch norms scales and shifts spread around 1 and 0 and the
    running statistics that `inputs` cause. Without this, activations vanish in eval mode and
    folding a norm into a convolution would change nothing.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None
    module.train()(*inputs)
    for norm in norms:
        norm.momentum = 0.1
    return module.eval()
