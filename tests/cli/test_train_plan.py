"""mopt train-plan: the plan by layer, as JSON, and the exit code of a budget that is too small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command_line import Call

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return x

def factory():
    return {"model": Net(), "example_inputs": (torch.randn(256, 32),)}
"""
QUICK = ("--costs", "estimated", "--time-limit", "1")


def test_the_plan_is_printed_by_layer(mopt: Call, place: Path) -> None:
    (place / "net.py").write_text(NET)
    done = mopt("train-plan", "net.py:factory", "--memory", "70%", "--optimizer", "adamw", *QUICK)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split() == [
        "layer",
        "kept",
        "compressed",
        "offloaded",
        "given",
        "up",
        "repeated",
        "time",
        "again",
    ]
    assert "layers.0" in done.out
    assert "least peak found" in done.out
    assert lines[-1].endswith("more time (estimated)")


def test_the_document_has_plan_and_layers(mopt: Call, place: Path) -> None:
    (place / "net.py").write_text(NET)
    data = mopt("train-plan", "net.py:factory", "--memory", "70%", "--json", *QUICK).document
    assert data["peak"] <= data["budget"] < data["plain_peak"]
    assert data["peak_bound"] <= data["least_peak"] <= data["peak"]
    assert data["seconds_bound"] <= data["repeated_seconds"]
    assert sum(row["repeated_calls"] for row in data["layers"]) > 0


LANGUAGE = """
import torch
from torch import nn

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(4000, 16)
        self.layer = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4000, bias=False)

    def forward(self, ids):
        return self.head(self.layer(self.words(ids)))

def factory():
    return {"model": Language(), "example_inputs": (torch.randint(4000, (2, 128)),)}
"""


def test_what_a_budget_needs_is_found_and_a_report_written(mopt: Call, place: Path) -> None:
    (place / "net.py").write_text(LANGUAGE)
    # Weights take 512 kB, their gradients as much, and logits 4 MB.
    done = mopt("train-plan", "net.py:factory", "--memory", "1700kB", "-o", "out", *QUICK)
    assert (done.code, done.err) == (0, "")
    assert "needs chunk_loss=True" in done.out
    assert "needs update_at_once=True" not in done.out
    training = json.loads((place / "out" / "report.json").read_text())["training"]
    assert training["needs"] == ["chunk_loss"]
    assert max(row["bytes"] for row in training["timeline"]) == training["peak"] <= 1_700_000
    assert {row["kind"] for row in training["timeline"]} >= {"forward", "backward"}
    assert max(training["plain_timeline"]) == training["plain_peak"]
    assert mopt("report", "out").code == 0
    assert "Training step" in (place / "out" / "report.html").read_text()
    other = mopt("report", "out", "--format", "md")
    assert other.code == 2 and "error[training-report]" in other.err


def test_too_little_memory_exits_1(mopt: Call, place: Path) -> None:
    (place / "net.py").write_text(NET)
    done = mopt("train-plan", "net.py:factory", "--memory", "20kB", *QUICK)
    assert done.code == 1
    assert "error[memory-budget-too-small]" in done.err
    assert "Weights, inputs and incoming gradients alone take" in done.err
    assert "The loss in pieces and updates at once are in use here" in done.err


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("randn(256, 32)", "randn(256, 31)", "model-does-not-run]: the model does not run on its"),
        ("return x", "return x.argmax(1)", "no-loss]: no output of the model is a floating-point"),
        ("Net(),", "Net().requires_grad_(False),", "nothing-to-train]: no parameter of the model"),
    ],
)
def test_mistakes_of_the_model_are_told_plainly(
    mopt: Call, place: Path, before: str, after: str, told: str
) -> None:
    (place / "net.py").write_text(NET.replace(before, after))
    done = mopt("train-plan", "net.py:factory", "--memory", "70%", *QUICK)
    assert done.code == 2
    assert f"error[{told}" in done.err


def test_what_is_no_budget_is_refused_before_the_model_is_made(mopt: Call, place: Path) -> None:
    (place / "net.py").write_text(NET)
    done = mopt("train-plan", "net.py:factory", "--memory", "lots")
    assert done.code == 2
    assert "error[memory-budget]: --memory is 'lots'" in done.err
