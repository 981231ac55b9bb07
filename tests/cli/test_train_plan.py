"""mopt train-plan: the plan by layer, as JSON, and the exit code of a budget that is too small."""

from __future__ import annotations

from pathlib import Path

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


def test_too_little_memory_exits_1(mopt: Call, place: Path) -> None:
    (place / "net.py").write_text(NET)
    done = mopt("train-plan", "net.py:factory", "--memory", "20kB", *QUICK)
    assert done.code == 1
    assert "error[memory-budget-too-small]" in done.err
    assert "Weights, inputs and incoming gradients alone take" in done.err


def test_what_is_no_budget_is_refused_before_the_model_is_made(mopt: Call, place: Path) -> None:
    (place / "net.py").write_text(NET)
    done = mopt("train-plan", "net.py:factory", "--memory", "lots")
    assert done.code == 2
    assert "error[memory-budget]: --memory is 'lots'" in done.err
