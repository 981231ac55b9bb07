"""Inputs and layers for the tests of passes that calibrate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mopt.calibration import Calibration
from mopt.frontend import capture
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests.case import Sample
from tests.tiny import normal


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows whose channels depend on each other and differ up to eightfold in size."""
    mix = normal(width, width, seed=100) / width**0.5 + torch.eye(width)
    return normal(rows, width, seed=seed) @ mix * torch.linspace(0.25, 2, width)


def one_linear(width: int = 64, rows: int = 24, *, bias: bool = False) -> Program:
    """A linear layer with normal weights, captured on two correlated inputs."""
    layer = nn.Linear(width, rows, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(normal(rows, width, seed=5) / width**0.5)
    return capture(layer.eval(), (correlated(2, width),), ({0: torch.export.Dim("batch")},))


def run_with(
    program: Program, batches: list[Tensor], *passes: tuple[str, dict[str, object]]
) -> Program:
    """The program after the passes, with tensors as calibration batches."""
    context = PassContext(calibration=Calibration([(batch,) for batch in batches], program))
    return Pipeline([make_pass(name, options) for name, options in passes]).run(program, context)


def batches_for(sample: Sample, count: int = 3) -> list[tuple[Tensor, ...]]:
    """Inputs like those of a sample, drawn anew, as calibration data."""
    return [
        tuple(
            torch.randint(0, int(value.max()) + 1, value.shape,
                          generator=torch.Generator().manual_seed(seed))
            if not value.is_floating_point()
            else torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
            for value in sample.inputs
        )
        for seed in range(count)
    ]  # fmt: skip
