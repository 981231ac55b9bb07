"""prune-experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mopt.calibration import Calibration
from mopt.errors import PassError, UsageError
from mopt.frontend import capture
from mopt.mixtures import find_mixtures, remove_experts
from mopt.models import _moe
from mopt.models._blocks import SwiGLU
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample, assert_near, outputs
from tests.mopt.test_capture_transformers import build
from tests.passes.quantize.calibrated import batches_for
from tests.tiny import Apply, normal, sample


def experts(kind: type[_moe.ExpertsBase]) -> Sample:
    """A small layer of experts of the zoo's kind, between two others."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.router = nn.Linear(16, _moe.EXPERTS, bias=True)
    layer.experts = nn.ModuleList(SwiGLU(16, 32) for _ in range(_moe.EXPERTS))
    return sample(Apply(lambda m, x: m.out(x + m.layer(x)), layer=layer, out=nn.Linear(16, 4)),
                  normal(2, 12, 16))  # fmt: skip


def all_scores_read() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        scores = m.router(x)
        best, _ = scores.topk(2, dim=-1)
        return m.out(x) * best.sum(-1, keepdim=True) + scores.flip(-1).sum(-1, keepdim=True)

    return sample(Apply(forward, router=nn.Linear(8, 4), out=nn.Linear(8, 4)), normal(3, 8))


def case(name: str, made: Sample, changed: bool, options: dict[str, Any], **more: Any) -> Case:
    program = made.capture()
    data = Calibration(batches_for(made), program)
    return Case(name, program, changed, options, calibration=lambda: data, **more)


CASES = [
    case("each-expert-its-layers", experts(_moe.DenseExperts), True, {}, tolerance=1.5),
    case("own-rows-only", experts(_moe.GatherExperts), True, {"importance": "usage"},
         tolerance=1.5),
    case("nothing-asked", experts(_moe.DenseExperts), False, {"ratio": 0.0}),
    case("less-than-one", experts(_moe.DenseExperts), False, {"ratio": 0.05},
         skipped="0.05 of 8 experts is none"),
    case("no-experts", tiny.mlp(), False, {}, skipped="no experts that a router chooses from"),
    case("not-tracked", all_scores_read(), False, {}, skipped="its experts stay"),
]  # fmt: skip


def only(program: Program, kept: list[int]) -> list[Tensor]:
    """The outputs with the scores of all other experts at minus infinity."""
    routers = {one.router for one in find_mixtures(program)[0]}

    def visit(node: fx.Node, value: Any) -> Any:
        if node not in routers:
            return None
        hidden = torch.full_like(value, -torch.inf)
        hidden[..., kept] = value[..., kept]
        return hidden

    found = program.interpret(visit, program.args, program.kwargs)
    return [one for one in found if isinstance(one, Tensor)]


def check(program: Program, kept: list[int]) -> None:
    expected = only(program, kept)
    before, mixtures = program.parameter_count(), find_mixtures(program)[0]
    assert mixtures
    for one in mixtures:
        remove_experts(program, one, kept)
    program.verify()
    assert program.parameter_count() < before
    found = outputs(program, program.args, program.kwargs)
    assert_near(expected, found, tolerance=1e-5, what="without experts")
    again, skips = find_mixtures(program)
    assert [one.experts for one in again] == [len(kept)] * len(mixtures) and not skips


@pytest.mark.parametrize("kind", [_moe.DenseExperts, _moe.GatherExperts])
def test_removed_experts_are_as_if_never_chosen(kind: type[_moe.ExpertsBase]) -> None:
    check(experts(kind).capture(), [1, 2, 4, 7])


@pytest.mark.parametrize("name", ["mixtral"])
def test_stacked_experts_of_transformers(name: str) -> None:
    model, inputs = build(name)
    check(capture(model, inputs(2, 0)), [0, 2, 3])


def prune(program: Program, data: Calibration, **options: Any) -> Program:
    ctx = PassContext(calibration=data)
    return Pipeline([make_pass("prune-experts", options)]).run(program, ctx)


def test_experts_that_no_row_reaches_go_first_and_leave_no_trace() -> None:
    made = experts(_moe.DenseExperts)
    with torch.no_grad():
        made.module.layer.router.bias[[2, 5]] = -50.0
        made.module.layer.router.bias[[0, 1, 3, 4, 6, 7]] += 10.0
    program = made.capture()
    data = Calibration(batches_for(made), program)
    result = prune(program, data, importance="usage")
    (removed,) = result.steps[-1].stats["removed"].values()
    assert removed == [2, 5]
    args = batches_for(made, 5)[-1]
    assert_near(outputs(program, args, {}), outputs(result, args, {}), tolerance=1e-5, what="")


def test_scores_by_hand() -> None:
    one = make_pass("prune-experts", {"importance": "task"})
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.5, 4.0, 1.0]])
    assert one._of_rows(logits, 2).tolist() == [3.0, 4.0, 0.0]
    two = make_pass("prune-experts", {"importance": "task", "strongest": 2})
    assert two._of_rows(logits, 2).tolist() == [3.0, 4.0, 3.0]
    usage = make_pass("prune-experts", {"importance": "usage"})
    assert usage._of_rows(logits, 2).tolist() == [1.0, 1.0, 2.0]


def test_bad_ratios_and_missing_data() -> None:
    made = experts(_moe.DenseExperts)
    program = made.capture()
    data = Calibration(batches_for(made), program)
    for ratio in (0.9, 1.0):
        with pytest.raises(UsageError, match="each row goes to 2") as caught:
            prune(program, data, ratio=ratio)
        assert caught.value.code == "empties-layer"
    with pytest.raises(UsageError, match="option ratio"):
        make_pass("prune-experts", {"ratio": 2.0})
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("prune-experts", {})]).run(program)
