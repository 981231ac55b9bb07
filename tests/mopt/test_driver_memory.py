"""compile() under a budget on memory."""

from __future__ import annotations

import json

import pytest
from torch import nn

import mopt
from mopt.driver import Settings
from mopt.errors import BudgetNotMet
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
