"""Residual streams turned to their principal axes: same outputs, few channels that matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mopt.calibration import Calibration
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from mopt.stream_rotation import rotate_streams
from tests.case import assert_near, outputs
from tests.tiny import Apply, sample

WIDTH = 16
CONSTANT = torch.linspace(0, 1, WIDTH)


def stream(*, directions: int = WIDTH, **changes: Any) -> Program:
    """A language model whose stream has so many directions, none of them an axis."""

    def forward(m: Apply, ids: Tensor) -> Tensor:
        x = m.table(ids)
        x = x + m.down(torch.relu(m.up(m.first(x))))
        return m.out(m.last(changes.get("between", lambda value: value)(x)))

    parts: dict[str, Any] = {
        "table": nn.Embedding(11, WIDTH), "first": nn.RMSNorm(WIDTH, eps=1e-5),
        "up": nn.Linear(WIDTH, 24), "down": nn.Linear(24, WIDTH),
        "last": changes.get("norm", nn.RMSNorm)(WIDTH, eps=1e-5), "out": nn.Linear(WIDTH, 5),
    }  # fmt: skip
    made = sample(Apply(forward, **parts), torch.arange(8).reshape(2, 4))
    onto = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:directions]
    with torch.no_grad():
        parts["first"].weight.uniform_(0.5, 1.5)
        parts["last"].weight.uniform_(0.5, 1.5)
        parts["table"].weight.copy_(parts["table"].weight @ onto.t() @ onto)
        parts["down"].weight.copy_(onto.t() @ onto @ parts["down"].weight)
        parts["down"].bias.copy_(parts["down"].bias @ onto.t() @ onto)
    return made.capture()


def context(program: Program) -> PassContext:
    batches = [torch.randint(0, 11, (2, 4)) for _ in range(6)]
    return PassContext(calibration=Calibration([(ids,) for ids in batches], program))


def test_the_outputs_stay_and_the_first_channels_hold_most() -> None:
    program = stream()
    turned = program.copy()
    assert rotate_streams(turned, context(program)) == ({"down": ["linear_1"]}, [])
    turned.verify()
    expected, found = (outputs(one, program.args, {}) for one in (program, turned))
    assert_near(expected, found, tolerance=1e-5, what="turned")
    table = next(t for name, t in turned.weights().items() if "table" in name)
    power = table.square().sum(0)
    assert power[: WIDTH // 2].sum() > 2 * power[WIDTH // 2 :].sum()


def shrunk(program: Program, **options: Any) -> Program:
    given = {"residual": True, "aim": "channels", "multiple": 1, "allow_slower": True,
             "importance": "activation", "refit": False, **options}  # fmt: skip
    return Pipeline([make_pass("prune-channels", given)]).run(program, context(program))


def test_a_stream_of_few_directions_shrinks_to_them_without_loss() -> None:
    program = stream(directions=4)
    result = shrunk(program, ratio=0.7, most=0.75, skip="up")
    stats = result.steps[-1].stats
    assert stats["rotated_streams"] == 1
    assert list(stats["widths"].values()) == [[WIDTH, WIDTH - 11]]
    expected, found = (outputs(one, program.args, {}) for one in (program, result))
    assert_near(expected, found, tolerance=1e-4, what="shrunk")
    # What is written now are no channels of the original that could be compared with it.
    assert result.plan["kept_channels"] == {}


def test_a_stream_that_keeps_its_width_is_not_turned() -> None:
    program = stream()
    result = shrunk(program, ratio=0.3, multiple=16)
    assert list(result.steps[-1].stats["widths"]) == ["up (neurons)"]
    assert "rotated_streams" not in result.steps[-1].stats
    assert torch.equal(result.weights()["table.weight"], program.weights()["table.weight"])


@pytest.mark.parametrize(("changes", "reason"), [
    ({"norm": nn.LayerNorm}, "without an RMS norm"),
    ({"between": torch.relu}, "looks at single channels"),
    ({"between": lambda x: x + CONSTANT}, "adds a constant"),
])  # fmt: skip
def test_streams_that_cannot_turn_say_why_and_stay(changes: dict[str, Any], reason: str) -> None:
    program = stream(**changes)
    before = program.fingerprint()
    streams, skips = rotate_streams(program, context(program))
    assert streams == {} and program.fingerprint() == before
    assert any(reason in skip.reason for skip in skips), skips
