"""prune-blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mopt.calibration import Calibration
from mopt.errors import PassError, UsageError
from mopt.pass_base import PassContext
from mopt.passes.prune.prune_blocks import influence
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample, outputs
from tests.passes.quantize.calibrated import batches_for
from tests.tiny import normal, sample


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    """Residual blocks and a head."""

    def __init__(self, count: int, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Branch(width) for _ in range(count))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def chain(*scales: float) -> Sample:
    """Blocks whose branches are of these sizes."""
    made = sample(Chain(len(scales)), normal(4, 8), dynamic=True)
    with torch.no_grad():
        for block, scale in zip(made.module.blocks, scales, strict=True):
            block.down.weight.mul_(scale)
            block.down.bias.mul_(scale)
    return made


def case(name: str, made: Sample, changed: bool, options: dict[str, Any], **more: Any) -> Case:
    program = made.capture()
    data = Calibration(batches_for(made), program)
    return Case(name, program, changed, options, calibration=lambda: data, **more)


MADE = chain(1.0, 1e-3, 2.0, 0.5, 1.0)
CASES = [
    case("one-of-five", MADE, True, {"ratio": 0.2}, tolerance=0.01),
    case("sublayers", MADE, True, {"ratio": 0.2, "what": "sublayers", "importance": "influence"},
         tolerance=0.01),
    case("images", tiny.small_cnn(), True, {"ratio": 0.5, "keep_first": 0}, tolerance=2.0),
    case("none-asked", MADE, False, {"ratio": 0.0}),
    case("less-than-one", MADE, False, {"ratio": 0.05}, skipped="0.05 of 5 blocks is none"),
    case("no-blocks", tiny.mlp(), False, {}, skipped="no blocks that could be left out"),
    case("left-out", MADE, False, {"skip": "blocks.*"}),
]  # fmt: skip


def prune(made: Sample, **options: Any) -> tuple[Program, Program]:
    program = made.capture()
    ctx = PassContext(calibration=Calibration(batches_for(made), program))
    return program, Pipeline([make_pass("prune-blocks", options)]).run(program, ctx)


@pytest.mark.parametrize("importance", ["loss", "influence"])
@pytest.mark.parametrize("what", ["blocks", "sublayers"])
def test_the_blocks_that_change_least_go(importance: str, what: str) -> None:
    made = chain(1.0, 1e-3, 2.0, 1e-2, 1.0)
    program, result = prune(made, ratio=0.4, importance=importance, what=what)
    stats = result.steps[-1].stats
    assert [path.partition("#")[0] for path in stats["removed"]] == ["blocks.1", "blocks.3"]
    assert stats["removed_flops"] == pytest.approx(1 - result.flops() / program.flops())
    kept = Chain(3)
    for at, old in enumerate((0, 2, 4)):
        kept.blocks[at] = made.module.blocks[old]
    kept.head = made.module.head
    batch = normal(7, 8, seed=3)
    assert torch.allclose(outputs(result, (batch,), {})[0], kept(batch).detach(), atol=1e-6)


def test_a_block_that_does_nothing_has_no_influence_and_neighbours_may_go_together() -> None:
    x = normal(2, 3, 8)
    assert influence(x, 2 * x) == pytest.approx(0, abs=1e-6)
    assert influence(x, -x) == pytest.approx(2)
    _, result = prune(chain(1.0, 1e-3, 1e-3, 1e-3, 1.0), ratio=0.6)
    assert len([n for n in result.graph.nodes if "linear" in str(n.target)]) == 5


def test_bad_ratios_and_missing_data() -> None:
    for ratio in (0.8, 1.0):
        with pytest.raises(UsageError, match="of which 3 may go") as caught:
            prune(chain(*[1.0] * 5), ratio=ratio)
        assert caught.value.code == "empties-layer"
    with pytest.raises(UsageError, match="option ratio"):
        make_pass("prune-blocks", {"ratio": -0.1})
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("prune-blocks", {})]).run(tiny.mlp().capture())
