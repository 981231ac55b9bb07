"""Which layers of a result are slower than they were."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mopt
from mopt import layer_speed
from mopt.cost import cost_model
from mopt.device import find_device
from mopt.errors import ArtifactError
from mopt.layer_speed import slower_layers
from mopt.proof import example_arrays
from tests import tiny


def nodes(**paths: str) -> Any:
    found = [SimpleNamespace(name=name, work=SimpleNamespace(path=path))
             for name, path in paths.items()]  # fmt: skip
    return SimpleNamespace(nodes=found)


class Child:
    """Stands in for the timing process: what each model's operators take, in turn."""

    def __init__(self, **models: list[list[Any]]) -> None:
        self.models = models

    def __call__(self, command: list[str], **more: Any) -> Any:
        job = json.loads(Path(command[-1]).read_text())
        if job["model"] not in self.models:
            raise ArtifactError("crashed", code="child-crashed")
        return SimpleNamespace(stdout=json.dumps(self.models[job["model"]]).encode())


BEFORE = nodes(a="one", b="two", c="")
AFTER = nodes(q="one", b="two", c="")


def found(monkeypatch: pytest.MonkeyPatch, child: Child) -> dict[str, tuple[float, float]]:
    monkeypatch.setattr(layer_speed, "run_child", child)
    return slower_layers((Path("old"), BEFORE), (Path("new"), AFTER), {}, 1)


def test_layers_are_compared_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [["a", 1.0], ["b", 1.0], ["c", 9.0]]
    slower = Child(old=old, new=[["q", 1.4], ["b", 0.5], ["c", 99.0]])
    assert found(monkeypatch, slower) == {"one": (1.0, 1.4)}
    barely = Child(old=old, new=[["q", 1.1], ["b", 1.0], ["c", 9.0]])
    assert found(monkeypatch, barely) == {}


def test_a_disturbed_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Disturbed(Child):
        def __call__(self, command: list[str], **more: Any) -> Any:
            found = super().__call__(command, **more)
            self.models["old"] = [["a", 5.0], ["b", 5.0], ["c", 5.0]]
            return found

    child = Disturbed(
        old=[["a", 0.2], ["b", 1.0], ["c", 1.0]], new=[["q", 1.0], ["b", 1.0], ["c", 1.0]]
    )
    assert found(monkeypatch, child) == {"one": (0.2, 1.0)}


def test_what_cannot_be_told_apart_or_timed_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [["a", 1.0], ["b", 1.0], ["c", 1.0]]
    assert found(monkeypatch, Child(old=old, new=[["other", 9.0], ["b", 9.0], ["c", 9.0]])) == {}
    assert found(monkeypatch, Child(old=old)) == {}


def test_the_timing_process_runs_what_the_model_executes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real model against itself: nothing is slower by so much, and every layer was timed."""
    monkeypatch.setattr(layer_speed, "_SECONDS", 0.05)
    monkeypatch.setattr(layer_speed, "_FACTOR", 0.0)
    monkeypatch.setattr(layer_speed, "_SHARE", -1e9)
    artifact = mopt.lower(tiny.mlp(64, 64).capture(), backend="onnx")
    folder = artifact.save(tmp_path / "out")
    model = folder / "model.onnx"
    inputs = example_arrays(artifact)
    cost = cost_model(find_device("cpu")).model_cost(model, inputs)
    timed = slower_layers((model, cost), (model, cost), inputs, 1)
    assert set(timed) == {node.work.path for node in cost.nodes if node.work.path} != set()
    assert all(before > 0 and after > 0 for before, after in timed.values())
