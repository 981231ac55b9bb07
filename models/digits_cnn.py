"""Residual CNN trained on 8x8 handwritten digits, with one depthwise-separable block (51 k)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from mopt.models._convolution import ConvNorm
from mopt.models._entry import CHECKPOINTS, Run, ZooModel, load_checkpoint, seeded

NAME = "digits-cnn"
TRAINED = True

BATCH = 36
CALIBRATION_BATCHES = 24
HELDOUT = 15 * BATCH
IMAGES = CHECKPOINTS / "digits-images.safetensors"


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut: a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvNorm(channels_in, channels_out, 3, stride=stride)
        self.second = ConvNorm(channels_out, channels_out, 3, activation=None)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = ConvNorm(channels_in, channels_out, 1, stride=stride, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class DigitsCnn(nn.Module):
    """Images [B, 1, 8, 8], values 0 to 1 -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 24, 3)
        self.plain = Residual(24, 24)
        self.narrow = Residual(24, 48, stride=2)
        self.depthwise = ConvNorm(48, 48, 3, groups=48)
        self.pointwise = ConvNorm(48, 96, 1)
        self.head = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.narrow(self.plain(self.stem(images)))
        x = self.pointwise(self.depthwise(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def build() -> nn.Module:
    with seeded(0):
        return load_checkpoint(DigitsCnn(), NAME)


def split(part: str) -> tuple[Tensor, Tensor]:
    """Images float32 [n, 1, 8, 8] and labels int64 [n] of `part`, "training" or "heldout".

    The split is a fixed permutation of the 1797 images, of which 540 (30 %) are held out.
    """
    stored = load_file(IMAGES)
    order = torch.randperm(len(stored["labels"]), generator=torch.Generator().manual_seed(0))
    rows = {"heldout": order[:HELDOUT], "training": order[HELDOUT:]}[part]
    return stored["images"][rows, None].float() / 16, stored["labels"][rows].long()


def example_inputs() -> tuple[Tensor]:
    return (split("training")[0][:BATCH],)


def dynamic_shapes() -> dict[str, dict[int, object]]:
    return {"images": {0: Dim("batch", min=1, max=4096)}}


def calibration() -> Iterator[tuple[Tensor]]:
    """Batches of training images."""
    images = split("training")[0]
    for batch in images.split(BATCH)[:CALIBRATION_BATCHES]:
        yield (batch,)


@torch.no_grad()
def evaluate(run: Run) -> dict[str, object]:
    """Share of the 540 held-out images that get the right label."""
    images, labels = split("heldout")
    right = 0
    for batch, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        logits = torch.as_tensor(run(batch))
        right += int((logits.argmax(1) == wanted).sum())
    return {
        "metric": MODEL.metric,
        "value": right / len(labels),
        "higher_is_better": MODEL.higher_is_better,
    }


MODEL = ZooModel(
    name=NAME,
    summary=__doc__,
    trained=TRAINED,
    build=build,
    example_inputs=example_inputs,
    dynamic_shapes=dynamic_shapes,
    calibration=calibration,
    evaluate=evaluate,
    metric="accuracy",
)
