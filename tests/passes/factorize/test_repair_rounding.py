"""repair-rounding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.formats.int_blocks import IntBlocks
from mopt.pass_base import PassContext
from mopt.passes.factorize.repair_rounding import repair
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample, outputs
from tests.passes.factorize.test_factorize_linears import called_twice, shared_with_a_product
from tests.passes.quantize.calibrated import batches_for, correlated
from tests.tiny import normal, sample

SMALL = {"min_size": 0, "rank": 16}


def case(name: str, made: Sample, changed: bool, options: dict[str, Any], **more: Any) -> Case:
    program = made.capture()
    data = Calibration(batches_for(made), program)
    return Case(name, program, changed, SMALL | options, calibration=lambda: data, **more)


# 4 bits in groups of 32 are off by 8 % per weight; 2 bits by 50 %.
CASES = [
    case("mlp", tiny.mlp(32, 64), True, {}, tolerance=0.1),
    case("plain", tiny.mlp(32, 64), True, {"method": "plain", "bits": 2}, tolerance=0.5),
    case("called-twice", called_twice(), True, {}, tolerance=0.1),
    case("head-stays", tiny.linear(64, 64), False, {}, skipped="the model's head"),
    case("small", tiny.mlp(32, 64), False, {"min_size": 4096}, skipped="fewer than min_size"),
    case("too-narrow", tiny.mlp(16, 64), False, {}, skipped="most of its 16 directions"),
    case("shared", shared_with_a_product(), False, {}, skipped="used elsewhere"),
    case("shorter-than-a-group", tiny.mlp(32, 64), False, {"group": 128}, skipped="128"),
]  # fmt: skip


def moment_of(columns: int) -> torch.Tensor:
    rows = correlated(400, columns).double()
    return rows.t() @ rows / len(rows)


def test_the_error_falls_with_the_rank_and_at_full_rank_nothing_is_lost() -> None:
    weight, moment, form = normal(48, 64), moment_of(64), IntBlocks(4, 32)
    errors = [repair(weight, form, rank, moment).errors for rank in (1, 2, 8, 16, 32, 48)]
    assert all(alone == errors[0][0] for alone, _ in errors)
    left = [error for _, error in errors]
    assert all(after <= before for before, after in pairwise(left))
    assert left[-1] < 1e-9 * errors[0][0]
    whole = repair(weight, form, 48, moment)
    assert torch.allclose(whole.rounded.double() + whole.second @ whole.first, weight.double(),
                          atol=1e-5)  # fmt: skip


def test_weighing_by_the_inputs_is_best_for_those_and_more_rounds_never_worse() -> None:
    weight, moment, form = normal(48, 64), moment_of(64), IntBlocks(2, 32)
    whitened = repair(weight, form, 16, moment)
    plain = repair(weight, form, 16, None)
    lost = weight.double() - plain.rounded - plain.second @ plain.first
    power = float(((weight.double() @ moment) * weight.double()).sum())
    assert whitened.errors[1] < float(((lost @ moment) * lost).sum()) / power
    assert repair(weight, form, 16, moment, rounds=5).errors[1] <= whitened.errors[1]
    even = repair(weight, form, 16, torch.eye(64))
    assert even.errors == pytest.approx(plain.errors)


def wide() -> tuple[Program, Calibration]:
    layers = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 4))
    made = sample(layers, correlated(2, 64), dynamic=True)
    program = made.capture()
    return program, Calibration([(correlated(300, 64, seed=s),) for s in range(2)], program)


def test_the_model_is_nearer_than_without_the_repair_and_small() -> None:
    program, data = wide()
    args = (correlated(100, 64, seed=7),)
    expected = outputs(program, args, {})[0]
    ctx = PassContext(calibration=data)

    def run(name: str, **options: Any) -> Program:
        return Pipeline([make_pass(name, {"min_size": 0, "bits": 2, **options})]).run(program, ctx)

    def error(result: Program) -> float:
        return float((outputs(result, args, {})[0] - expected).square().mean())

    repaired, rounded = run("repair-rounding", rank=16), run("quantize-weights", group=32)
    assert error(repaired) < 0.7 * error(rounded)
    assert repaired.size_bytes() < 0.6 * program.size_bytes()
    assert set(repaired.plan["formats"]) == {"0", "2"}
    for alone, left in repaired.steps[-1].stats["output_error"].values():
        assert left < alone


def test_ranks_and_data_it_needs() -> None:
    program, _ = wide()
    with pytest.raises(PassError, match="rank 20 is not a multiple of 16"):
        Pipeline([make_pass("repair-rounding", {"rank": 20})]).run(program)
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("repair-rounding", {"method": "whitened"})]).run(program)
