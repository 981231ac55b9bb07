"""Passes on calibration data find what they found before on the same model and data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mopt.cache import Cache
from mopt.calibration import Calibration
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from mopt.streaming import Stream
from tests.tiny import normal, sample


def net() -> Program:
    """A norm and two linear layers."""
    layers = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    return sample(layers, normal(5, 64)).capture()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that calibration data was sent through."""
    found: list[Program] = []
    plain = Stream.__init__

    def noted(self: Stream, program: Program, *rest: object) -> None:
        found.append(program)
        plain(self, program, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Stream, "__init__", noted)
    return found


def compressed(name: str, folder: Path, seed: int = 1, **options: object) -> Program:
    """The net after one pass, with a cache in ``folder``."""
    program = net()
    data = [(normal(5, 64, seed=seed) * torch.linspace(0.1, 9, 64),)]
    ctx = PassContext(
        calibration=Calibration(data, program), cache=Cache(folder, worth_seconds=0)
    )  # fmt: skip
    return Pipeline([make_pass(name, {"bits": 4, "group": 32, **options})]).run(program, ctx)


@pytest.mark.parametrize(
    ("name", "options"),
    [("scale-awq", {}), ("quantize-gptq", {}), ("quantize-weights", {"ranges": "output"})],
)
def test_the_same_data_goes_through_the_model_once(
    name: str, options: dict[str, object], tmp_path: Path, streams: list[Program]
) -> None:
    first = compressed(name, tmp_path, **options)
    before = len(streams)
    again = compressed(name, tmp_path, **options)
    assert before > 0 and len(streams) == before
    assert again.fingerprint() == first.fingerprint()
    assert again.steps[-1].stats == first.steps[-1].stats
    assert again.steps[-1].skipped == first.steps[-1].skipped
    other = compressed(name, tmp_path, seed=2, **options)
    assert len(streams) == 2 * before and other.fingerprint() != first.fingerprint()


def test_an_encoding_that_is_gone_is_made_again(tmp_path: Path, streams: list[Program]) -> None:
    first = compressed("quantize-gptq", tmp_path)
    next(tmp_path.rglob("encoded-*/*.safetensors")).unlink()
    again = compressed("quantize-gptq", tmp_path)
    assert len(streams) == 4 and again.fingerprint() == first.fingerprint()
