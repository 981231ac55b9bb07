"""Weights that stay on disk: the same bits, and never more of them in memory than allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mopt.backends.eager.lower import BACKEND
from mopt.errors import UsageError
from mopt.lowering import load, lower
from mopt.program import Program
from tests.case import Sample
from tests.tiny import normal


class Tied(nn.Module):
    """An embedding that is the head, too, and layers between them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x)


def saved(folder: Path, module: nn.Module, *inputs: Tensor) -> Program:
    """The program of a module, whose eager artifact is in ``folder``."""
    program = Sample(module.eval(), inputs).capture()
    lower(program, "eager").save(folder)
    return program


def test_streamed_runs_equal_resident_ones(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tokens = torch.arange(20).reshape(2, 10)
    program = saved(tmp_path / "out", Tied(), tokens)
    runner: Any = BACKEND.open(tmp_path / "out", None, threads=None, resident=0.4)
    limit = int(0.4 * (tmp_path / "out" / "weights.safetensors").stat().st_size)
    for seed in range(3):
        x = torch.randint(100, (2, 10), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(runner.run([x])[0], program.run(x))
    assert len(runner._module.stretches) > 4
    assert 0 < runner._module.peak_resident <= limit
    runner.close()


def test_a_convolution_in_channels_last_is_read_in_its_layout(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    x = normal(1, 3, 12, 12)
    program = saved(tmp_path / "out", net.to(memory_format=torch.channels_last), x)
    with load(tmp_path / "out", resident=1.0) as run:
        assert torch.equal(run(x), program.run(x))


def test_a_failed_run_does_not_spoil_the_next(tmp_path: Path) -> None:
    program = saved(tmp_path / "out", Tied(), torch.arange(20).reshape(2, 10))
    with load(tmp_path / "out", resident=0.5) as run:
        with pytest.raises(IndexError):
            run(torch.full((2, 10), 100))
        x = torch.arange(20).reshape(2, 10)
        assert torch.equal(run(x), program.run(x))


@pytest.mark.parametrize(
    ("resident", "code"),
    [(0.01, "resident-too-small"), (0.0, "bad-resident"), (1.5, "bad-resident")],
)
def test_impossible_shares_are_refused(tmp_path: Path, resident: float, code: str) -> None:
    saved(tmp_path / "out", Tied(), torch.arange(20).reshape(2, 10))
    with pytest.raises(UsageError) as caught:
        load(tmp_path / "out", resident=resident)
    assert caught.value.code == code


def test_other_backends_say_that_they_cannot(tmp_path: Path) -> None:
    net = nn.Linear(4, 4).eval()
    lower(Sample(net, (normal(1, 4),)).capture(), "onnx").save(tmp_path / "out")
    with pytest.raises(UsageError, match="keeps all weights in memory"):
        load(tmp_path / "out", resident=0.5)
