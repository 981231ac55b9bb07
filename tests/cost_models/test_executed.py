"""What the runtime executes is the same whether it is asked here or in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mopt.cost_models import executed_run
from mopt.cost_models.executed import executed_model
from mopt.cost_models.probe_models import build_probe
from mopt.errors import ArtifactError, InputError


@pytest.fixture(name="model")
def _model(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    built, inputs, _ = build_probe("linear.fp32", (4, 8, 16), 4)
    path = tmp_path / "model.onnx"
    path.write_bytes(built)
    return path, inputs


def test_a_process_of_its_own_finds_the_same(
    model: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, inputs = model
    here = executed_model(path, inputs)
    monkeypatch.setattr(executed_run, "_APART_BYTES", 0)
    there = executed_model(path, inputs)
    assert there == here and len(there.nodes) > 5
    assert executed_model(path).nodes == here.nodes  # zeros of the declared shapes


@pytest.mark.parametrize("apart", [0, 1 << 40])
def test_errors_are_the_same(
    model: tuple[Path, dict[str, np.ndarray]], apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, inputs = model
    monkeypatch.setattr(executed_run, "_APART_BYTES", apart)
    wrong = {name: value[:, :2] for name, value in inputs.items()}
    with pytest.raises(InputError) as caught:
        executed_model(path, wrong)
    assert caught.value.code == "onnx-run-failed" and "\n" not in caught.value.message
    path.write_bytes(b"no model")
    with pytest.raises(ArtifactError) as broken:
        executed_model(path, inputs)
    assert broken.value.code == "onnx-load-failed"
