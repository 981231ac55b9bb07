"""compile() under a budget on memory, and within the memory and the time it may take itself."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import mopt
from mopt.allowance import Allowance
from mopt.cli._summary import remarks
from mopt.driver import Settings
from mopt.errors import BudgetNotMet, LimitError
from mopt.pipeline import Step
from tests.tiny import normal


def test_a_memory_budget_makes_the_eager_artifact_run_by_a_plan() -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    with pytest.raises(BudgetNotMet, match="not measured") as caught:
        mopt.compile(
            net, (normal(4, 32),), backend="eager", recipe="none", budget="memory<=1GiB",
            settings=Settings(measure=False),
        )  # fmt: skip
    artifact = caught.value.artifact
    assert artifact is not None
    plan = json.loads((artifact.folder / "plan.json").read_text())
    assert plan["measured_bytes"] <= 1.01 * plan["peak_bytes"] + 64
    assert [step["name"] for step in artifact.report.data["steps"]][-1] == "plan-memory"


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()


def test_a_model_that_does_not_fit_twice_is_compiled_without_its_uncompressed_self(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Allowance, "fits", lambda self, more: False)
    artifact = mopt.compile(wide(), (normal(4, 64),), recipe="int4-weight")
    data = artifact.report.data
    assert data["baseline"]["size_bytes"] == 4 * (2 * 64 * 256 + 256 + 64)
    assert data["speed"] is None and data["baseline"]["latency_ms"]["estimated"] is None
    assert data["result"]["size_bytes"] < data["baseline"]["size_bytes"] / 4
    assert "was not built" in data["notes"][0]
    assert data["notes"][0] in remarks(data)[0]


def test_more_memory_than_allowed_ends_the_compile() -> None:
    with pytest.raises(LimitError, match=r"mopt holds .* more than the limit of 1\.0 MB"):
        mopt.compile(wide(), (normal(4, 64),), max_memory_bytes=10**6)


class Slow:
    """A watcher that lets the time run out while the pass before it is told."""

    def __init__(self, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.after, self.patch = after, monkeypatch

    def __call__(self, step: Step) -> None:
        if step.name == self.after:
            self.patch.setattr(Allowance, "seconds_left", lambda self: -1.0)


def test_what_is_done_when_time_is_up_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow("quantize-weights", monkeypatch)
    with pytest.raises(BudgetNotMet, match="quantize-embeddings and what comes after") as caught:
        mopt.compile(wide(), (normal(4, 64),), recipe="int4-weight", callbacks=[slow])
    assert caught.value.code == "max-minutes"
    data = caught.value.artifact.report.data
    assert [step["name"] for step in data["steps"]][-1] == "quantize-weights"
    assert data["layers"][0]["format"].startswith("int4")
    assert data["speed"] is None  # no time is left to measure


def test_nothing_done_when_time_is_up_is_an_error() -> None:
    with pytest.raises(LimitError, match="time is up"):
        mopt.compile(wide(), (normal(4, 64),), max_minutes=1e-9)
