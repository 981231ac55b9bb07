"""The fullest moment of a plan, and the message of a memory budget that is not met."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import mopt
from mopt.driver import Settings
from mopt.errors import BudgetNotMet
from mopt.memory_moment import busy, fullest_moment
from mopt.rounds import Attempt
from tests.tiny import normal


def row(name: str, lower: int, upper: int, size: int, shares: str | None = None) -> dict[str, Any]:
    """A buffer of a plan."""
    return {"id": name, "lower": lower, "upper": upper, "bytes": size, "shares": shares}


def test_memory_that_is_taken_over_counts_once() -> None:
    plan = {
        "steps": [{"node": f"n{k}", "workspace_bytes": 5 * (k == 1)} for k in range(4)],
        "buffers": [row("a", 0, 2, 10), row("b", 1, 4, 10, "a"), row("c", 1, 3, 4),
                    row("none", 0, 4, 0)],
    }  # fmt: skip
    assert [(r["id"], *steps) for r, *steps in busy(plan)] == [
        ("a", 0, 2), ("b", 2, 4), ("c", 1, 3),
    ]  # fmt: skip
    moment = fullest_moment(plan)
    assert moment is not None
    assert moment.text() == "19 bytes in step 1 (n1): a (10), c (4), 5 of workspace"
    assert fullest_moment({"steps": [], "buffers": []}) is None


def test_a_budget_that_is_not_met_names_the_moment_and_its_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"memory": (5_000_000.0, 6_000_000.0)}
    monkeypatch.setattr(Attempt, "values", lambda *_: found)
    net = nn.Sequential(nn.Linear(32, 640), nn.Tanh(), nn.Linear(640, 8)).eval()
    with pytest.raises(BudgetNotMet) as caught:
        mopt.compile(
            net, (normal(4, 32),), backend="eager", recipe="none", budget="memory<=4MB",
            settings=Settings(measure=False),
        )  # fmt: skip
    said = caught.value.message
    assert "memory<=4MB (found 5e+06, limit 4e+06); beside the weights the plan needs 10," in said
    # The second linear reads the wide result, in the memory of the first, and makes the narrow one.
    assert "in step 2 (linear_1): tanh (10,240), linear_1 (128)" in said
    assert "no order and no layout needs less" in said
