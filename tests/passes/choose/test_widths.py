"""Widths as candidates of choose-formats: chosen with formats, priced as they turn out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mopt.budget import Budget
from mopt.calibration import Calibration
from mopt.frontend import capture
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests.passes.choose.test_choose_formats import TableModel
from tests.tiny import normal


class HalfIdle(nn.Module):
    """Half of the hidden neurons never fire, so half of them can go without any loss."""

    def __init__(self, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        with torch.no_grad():
            self.up.weight[::2], self.up.bias[::2] = 0.0, -1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def chosen(*texts: str, model: Any = None, **options: Any) -> tuple[Program, Program]:
    program = capture(HalfIdle().eval(), (normal(512, 64),))
    context = PassContext(
        calibration=Calibration([(normal(512, 64),)], program), budget=Budget.parse(texts),
        cost_model=model or TableModel(), seed=0,
    )  # fmt: skip
    one = make_pass("choose-formats", {"min_size": 0, **options})
    return program, Pipeline([one]).run(program, context)


def shapes(program: Program) -> list[tuple[int, ...]]:
    return [tuple(n.meta["val"].shape) for n in program.nodes
            if n.op == "call_function" and n.meta["val"].dim() == 2]  # fmt: skip


def test_what_is_idle_goes_without_loss() -> None:
    """fp32 only: the width is all there is to choose."""
    _, result = chosen("minimize=latency", "quality>=0.97", formats="fp16")
    (width,) = result.plan["choice"]["widths"]
    assert (width["chosen"], width["kept"], width["of"]) == ("width-50", 128, 256)
    x = normal(8, 64)
    expected = HalfIdle().eval()(x)
    torch.testing.assert_close(result.run(x), expected, rtol=1e-3, atol=1e-3)
    assert (512, 128) in shapes(result)


def test_widths_and_formats_are_priced_together() -> None:
    """The bytes and the time of a narrow layer in a few bits are those of the result."""
    program, result = chosen("minimize=size", "quality>=0.9")
    choice = result.plan["choice"]
    assert choice["widths"][0]["chosen"] != "original" and result.plan["formats"]
    assert choice["estimated"]["size"] == pytest.approx(result.size_bytes(), rel=1e-6)
    assert result.size_bytes() < 0.2 * program.size_bytes()


def test_nothing_becomes_narrower_where_little_may_be_lost_or_nothing_gained() -> None:
    for texts, more in (
        (("minimize=latency", "quality>=0.99"), {}),
        (("minimize=latency", "quality>=0.9"), {"widths": False}),
    ):
        _, result = chosen(*texts, **more)
        assert result.plan["choice"]["widths"] == []

    class Flat(TableModel):
        def layer_cost(self, *args: Any, **more: Any) -> Any:
            found = super().layer_cost("linear", (64, 64), *args[2:], **more)
            return found

    _, result = chosen("minimize=latency", "quality>=0.9", model=Flat())
    assert all(one["chosen"] == "original" for one in result.plan["choice"]["widths"])
