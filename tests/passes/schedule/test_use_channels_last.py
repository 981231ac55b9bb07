"""use-channels-last."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.lowering import lower
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests.case import Case, Sample
from tests.tiny import Apply, normal, sample

EAGER = {"backend": "eager"}


class Net(nn.Module):
    """A skip that is concatenated, and a flat view of an image at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.low = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.norm(self.down(x)).relu()
        low = self.low(skip).relu_()
        y = self.head(torch.cat((skip, self.up(low)), 1))
        return y.view(y.shape[0], -1)


def last(module: nn.Module) -> Sample:
    """A module that its owner brought into the layout."""
    return Sample(module.eval().to(memory_format=torch.channels_last), (normal(2, 3, 8, 8),))


def computed_weight() -> Sample:
    return sample(Apply(lambda m, x: F.conv2d(x, x[:1, :, :3, :3].contiguous())),
                  normal(2, 3, 8, 8))  # fmt: skip


CASES = [
    Case("net", lambda: sample(Net(), normal(2, 3, 8, 8)), changed=True, context=EAGER),
    Case("already-so", lambda: last(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())),
         changed=False, context=EAGER),
    Case("other-backend", lambda: sample(Net(), normal(2, 3, 8, 8)), changed=False,
         skipped="chooses layouts"),
    Case("computed-weight", computed_weight, changed=False, context=EAGER, skipped="is computed"),
]  # fmt: skip


def test_the_layout_survives_the_artifact() -> None:
    program = sample(Net(), normal(2, 3, 8, 8)).capture()
    context = PassContext(backend="eager")
    result = Pipeline([make_pass("use-channels-last", {})]).run(program, context)
    x = normal(2, 3, 8, 8, seed=3)
    with lower(result, "eager").load() as run:
        assert torch.equal(run(x), result.run(x))
        assert run(x).is_contiguous()
