"""prune-progressively."""

from __future__ import annotations

from typing import Any

import pytest

from mopt.calibration import Calibration
from mopt.errors import PassError, UsageError
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.prune.costs import BlockModel
from tests.passes.quantize.calibrated import batches_for

QUICK = {"multiple": 1, "rounds": 2, "candidates": 2}


def case(name: str, made: Sample, changed: bool, options: dict[str, Any], **more: Any) -> Case:
    program = made.capture()
    data = Calibration(batches_for(made), program)
    return Case(name, program, changed, QUICK | options, calibration=lambda: data,
                **{"context": {"cost_model": BlockModel(1)}, **more})  # fmt: skip


CASES = [
    case("images", tiny.small_cnn(16), True, {}, tolerance=2.0),
    case("bytes-only", tiny.mlp(), True, {"flops": 1.0, "memory": 0.7}, tolerance=0.9),
    case("within-the-budget", tiny.mlp(), False, {"flops": 1.0}, skipped="within the budget"),
    case("no-faster", tiny.mlp(), False, {"flops": 0.9}, context={"cost_model": BlockModel(64)},
         skipped="not estimated to be faster"),
]  # fmt: skip


def prune(made: Sample, **options: Any) -> tuple[Program, Program]:
    program = made.capture()
    data = Calibration(batches_for(made, 8), program)
    ctx = PassContext(calibration=data, cost_model=BlockModel(1))
    return program, Pipeline([make_pass("prune-progressively", QUICK | options)]).run(program, ctx)


def test_both_budgets_hold_and_the_best_way_of_each_round_is_told() -> None:
    program, result = prune(tiny.small_cnn(16), flops=0.6, memory=0.5, candidates=3)
    assert result.flops() <= 0.6 * program.flops()
    assert result.parameter_count() <= 0.5 * program.parameter_count()
    story = result.steps[-1].stats["rounds"]
    assert len(story) == 2 and all(one["distance"] >= 0 for one in story)
    _, single = prune(tiny.small_cnn(16), flops=0.6, memory=0.5, candidates=1)
    assert story[0]["distance"] <= single.steps[-1].stats["rounds"][0]["distance"]


def test_bad_budgets_and_missing_data() -> None:
    with pytest.raises(UsageError, match="a budget of 0") as caught:
        prune(tiny.mlp(), flops=0.0)
    assert caught.value.code == "empties-layer"
    with pytest.raises(UsageError, match="option memory"):
        prune(tiny.mlp(), memory=1.5)
    with pytest.raises(UsageError, match="would empty layers"):
        prune(tiny.mlp(), flops=0.02)
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("prune-progressively", {})]).run(tiny.mlp().capture())
