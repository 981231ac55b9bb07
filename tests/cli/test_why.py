"""mopt inspect DIR --why LAYER|budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command_line import Call

FACTORY = """
import torch
from torch import nn

def factory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    return {"model": model, "example_inputs": (torch.randn(4, 64),)}
"""


@pytest.fixture
def artifact(mopt: Call, place: Path) -> str:
    (place / "wide.py").write_text(FACTORY)
    done = mopt("compile", "wide.py:factory", "-o", "out", "--no-measure", "--budget", "size<=0.6x",
                "--budget", "minimize=loss", "--set", "choose-formats.min_size=0")  # fmt: skip
    assert done.code == 0, done.err
    return "out"


def test_explains_layers_and_budget_and_refuses_the_rest(mopt: Call, artifact: str) -> None:
    report = json.loads((Path(artifact) / "report.json").read_text())
    assert report["recipe"] == "auto"
    assert report["prices"]["size"] > 0
    assert {"size"} <= set(report["estimate_error"])

    layer = mopt("inspect", artifact, "--why", "0")
    assert layer.code == 0, layer.err
    assert "linear 128 x 64" in layer.out
    assert "chosen" in layer.out
    assert "runner-up" in layer.out
    assert "1 MB more of size" in layer.out or "MB more of size would take" in layer.out

    data = json.loads(mopt("inspect", artifact, "--why", "0", "--json").out)
    names = {row["format"] for row in data["candidates"]}
    assert {data["chosen"], data["runner_up"], "original"} <= names

    budget = mopt("inspect", artifact, "--why", "budget")
    assert budget.code == 0, budget.err
    assert "binding  size" in budget.out
    assert "round 1" in budget.out

    unknown = mopt("inspect", artifact, "--why", "00")
    assert unknown.code == 2
    assert "no layer is called '00'" in unknown.err


def test_a_report_that_was_tampered_with_is_refused(mopt: Call, artifact: str) -> None:
    path = Path(artifact) / "report.json"
    report = json.loads(path.read_text())
    report["prices"] = ["a"]
    path.write_text(json.dumps(report))
    found = mopt("inspect", artifact, "--why", "0")
    assert found.code == 2
    assert "the choice is malformed" in found.err


def test_needs_an_artifact_that_was_chosen(mopt: Call, net: str) -> None:
    assert mopt("compile", net, "-o", "out", "--no-measure", "-r", "none").code == 0
    plain = mopt("inspect", "out", "--why", "budget")
    assert plain.code == 2
    assert "treats all layers alike" in plain.err
    model = mopt("inspect", net, "--why", "budget")
    assert model.code == 2
    assert "for the folder of an artifact" in model.err


def test_shows_what_became_narrower(mopt: Call, place: Path) -> None:
    idle = FACTORY.replace(
        "return {",
        "model[0].weight.data[::2], model[0].bias.data[::2] = 0.0, -1.0\n    return {"
        "'calibration': [(torch.randn(4, 64),) for _ in range(64)], ",
    )
    (place / "idle.py").write_text(idle)
    done = mopt("compile", "idle.py:factory", "-o", "idle", "--no-measure", "--budget",
                "quality>=0.9x", "--budget", "minimize=size", "--set",
                "choose-formats.min_size=0", "--allow-slower")  # fmt: skip
    assert done.code == 0, done.err
    shown = mopt("inspect", "idle", "--why", "budget")
    assert "narrower 0: 64 of 128 neurons kept" in shown.out
