"""Train `digits-cnn`; write `digits-cnn` and `digits-images` to `checkpoints/*.safetensors`.

    python -m mopt.models._train_digits_cnn

Takes about 20 seconds. The images come from scikit-learn, which only this script needs. The
held-out images play no part: the number of epochs is fixed and nothing is selected by their
accuracy.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.models._entry import CHECKPOINTS
from mopt.models.digits_cnn import IMAGES, NAME, DigitsCnn, build, evaluate, split

EPOCHS = 60
BATCH = 64
PEAK_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05


def main() -> None:
    export_images()
    torch.manual_seed(0)
    model = train(*split("training"))
    weights = {key: stored(value) for key, value in model.state_dict().items()}
    save_file(weights, CHECKPOINTS / f"{NAME}.safetensors")
    print(f"held-out accuracy: {evaluate(build())['value']:.4f}")


def export_images() -> None:
    """scikit-learn's copy of the UCI test set: 1797 images of 8x8 pixels, grey values 0 to 16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8)
    save_file({"images": images, "labels": torch.from_numpy(digits.target).to(torch.uint8)}, IMAGES)


def train(images: Tensor, labels: Tensor) -> nn.Module:
    model = DigitsCnn()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    per_epoch = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, EPOCHS * per_epoch)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images))[: per_epoch * BATCH].split(BATCH):
            logits = model(shifted(images[rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def shifted(images: Tensor) -> Tensor:
    """Each image moved, turned, scaled and sheared a little, drawn anew each time."""
    count = len(images)
    amount = torch.tensor([[0.12, 0.15, 0.12], [0.15, 0.12, 0.12]])
    noise = torch.empty(count, 2, 3).uniform_(-1, 1) * amount
    grid = F.affine_grid(torch.eye(2, 3) + noise, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def stored(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


if __name__ == "__main__":
    main()
