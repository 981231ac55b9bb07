"""mopt pareto: the front of best choices, as a table, in characters and as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from mopt.cli.pareto import draw
from tests.cli.command_line import Call

FACTORY = """
import torch
from torch import nn

def factory():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)]
    return {"model": nn.Sequential(*layers).eval(), "example_inputs": (torch.randn(4, 64),)}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def wide(place: Path) -> str:
    (place / "wide.py").write_text(FACTORY)
    return "wide.py:factory"


def test_no_point_of_the_front_is_beaten_by_another(mopt: Call, wide: str) -> None:
    done = mopt("pareto", wide, "--points", "6", "--no-measure", "--json")
    assert done.code == 0, done.err
    points = done.document["points"]
    assert 3 <= len(points) <= 6
    for one, other in pairwise(points):
        assert one["size"] < other["size"] and one["loss"] > other["loss"]
    assert points[-1]["loss"] <= 1e-5 < points[-2]["loss"]
    assert points[0]["size"] < 0.4 * points[-1]["size"]
    assert all(point["budget"].startswith("size<=") for point in points)


def test_prints_the_front_and_the_budgets_that_give_it(mopt: Call, wide: str) -> None:
    done = mopt("pareto", wide, "--points", "4", "--no-measure")
    assert done.code == 0, done.err
    assert "least loss for each size, estimated" in done.out
    assert sum("o" in line for line in done.out.splitlines() if line[10:11] == "|") >= 2
    rows = [line for line in done.out.splitlines() if line.lstrip().startswith("size<=")]
    # The budget that a point is printed with is one that the compile takes.
    again = mopt("compile", wide, "-o", "out", "--no-measure", "--budget", rows[1].split()[0])
    assert again.code == 0, again.err


def test_takes_any_device_as_target(mopt: Call, wide: str) -> None:
    done = mopt("pareto", wide, "-t", "cortex-m7", "--along", "latency", "--points", "3")
    assert done.code == 0, done.err
    assert "least loss for each latency" in done.out
    unknown = mopt("pareto", wide, "-t", "cortex")
    assert unknown.code == 2
    assert "error[unknown-device]" in unknown.err


def test_draws_a_picture_where_matplotlib_is(mopt: Call, wide: str, place: Path) -> None:
    done = mopt("pareto", wide, "--points", "3", "--no-measure", "--png", "front.png")
    if find_spec("matplotlib") is None:
        assert done.code == 2
        assert "error[missing-package]" in done.err
        assert "mopt[report]" in done.err
        return
    assert done.code == 0, done.err
    assert (place / "front.png").read_bytes().startswith(b"\x89PNG")


def test_points_in_characters() -> None:
    lines = draw([(1.0, 9.0), (2.0, 3.0), (3.0, 0.0)])
    assert lines[0].split("|")[1] == "o"
    assert lines[-3].rstrip().endswith("o")
    assert lines[-1].split() == ["1", "3"]
    assert draw([]) == []
    assert sum(line.count("o") for line in draw([(5.0, 1.0)])) == 1
