"""Passes that only rescale or rotate leave the float32 function as it is, to 1e-5."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mopt.frontend import capture
from tests.passes.quantize.calibrated import correlated, run_with
from tests.tiny import normal

PASSES: dict[str, dict[str, object]] = {
    "scale-awq": {"group": 16},
    "smooth-activations": {"insert": True},
    "equalize-channels": {},
    "rotate-activations": {"keep": 1.0, "block": 16},
    "split-outliers": {"by": "value", "keep": 1.0},
}


@pytest.mark.parametrize("name", PASSES)
def test_the_function_stays_to_one_in_a_hundred_thousand(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.LayerNorm(64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.LayerNorm(32),
        nn.Linear(32, 16),
    )  # fmt: skip
    with torch.no_grad():  # channels of unequal size, so that every pass finds something to do
        module[0].weight.copy_(torch.logspace(-1, 1, 64)[torch.randperm(64)])
        module[3].weight.mul_(torch.logspace(-1, 1, 96))
    program = capture(module.eval(), (normal(4, 64),), ({0: torch.export.Dim("batch", max=999)},))
    result = run_with(program, [correlated(60, 64, seed=1)], (name, PASSES[name]))
    assert result.steps[-1].changed
    rows = correlated(200, 64, seed=2)
    wanted = program.run(rows)
    assert float((result.run(rows) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
