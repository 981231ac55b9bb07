"""prune-sparsegpt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mopt.calibration import Calibration
from mopt.errors import PassError, UsageError
from mopt.passes.prune._compensate import prune_compensated
from mopt.passes.prune._masks import Pattern
from mopt.pipeline import Pipeline
from mopt.recipe import Recipe
from mopt.registry import make_pass
from mopt.second_order import output_error
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import batches_for, correlated, one_linear, run_with
from tests.tiny import normal

SMALL = {"min_size": 0}
HALF, TWO_OF_FOUR = Pattern(0.5), Pattern(0.5, 2, 4)


def case(name: str, made: Sample, changed: bool, options: dict[str, Any], **more: Any) -> Case:
    program = made.capture()
    data = Calibration(batches_for(made), program)
    return Case(name, program, changed, SMALL | options, calibration=lambda: data, **more)


# Half of random weights are zero: what is lost is of the size of the outputs.
CASES = [
    case("half", tiny.mlp(), True, {}, tolerance=1.0),
    case("two-of-four", tiny.mlp(), True, {"pattern": "2:4"}, tolerance=1.0),
    case("convolutions", tiny.small_cnn(), True, {"ratio": 0.3}, tolerance=1.0),
    case("decoder", tiny.decoder(), True, {"ratio": 0.3}, tolerance=1.0),
    case("head-stays", tiny.linear(), False, {}, skipped="the model's head"),
    case("groups-stay", tiny.conv_bn_relu(groups=2), False, {}, skipped="groups read different"),
]  # fmt: skip


def moment_of(rows: Tensor) -> Tensor:
    return rows.double().t() @ rows.double() / len(rows)


def masked_only(weight: Tensor, moment: Tensor, pattern: Pattern) -> Tensor:
    scores = weight.abs() * moment.diagonal().sqrt()
    return weight * pattern.kept(scores, per_row=True)


@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR, Pattern(0.75, 1, 4), Pattern(0.3)])
def test_the_summed_loss_is_the_error_of_the_output(pattern: Pattern) -> None:
    weight, moment = normal(16, 200), moment_of(correlated(1000, 200))
    found = prune_compensated(weight, moment, pattern, damping=0.0)
    assert found.damping == 0
    assert found.loss == pytest.approx(output_error(weight - found.weight, moment), rel=1e-6)


def test_zeros_have_the_pattern_and_the_rest_makes_up_for_them() -> None:
    weight, moment = normal(32, 256), moment_of(correlated(2000, 256))
    for pattern in (HALF, TWO_OF_FOUR):
        found = prune_compensated(weight, moment, pattern)
        assert float((found.weight == 0).double().mean()) == pytest.approx(0.5)
        if pattern.group:
            groups = (found.weight != 0).unflatten(1, (-1, 4)).sum(2)
            assert int(groups.max()) <= 2
        plain = output_error(weight - masked_only(weight, moment, pattern), moment)
        share = 0.9 if pattern.group else 0.65
        assert output_error(weight - found.weight, moment) < share * plain


def test_no_compensation_beats_the_least_squares_solution_on_its_mask() -> None:
    weight, moment = normal(6, 64), moment_of(correlated(500, 64))
    found = prune_compensated(weight, moment, HALF, damping=0.0)
    best = torch.zeros(6, 64, dtype=torch.float64)
    for row, kept in enumerate(found.weight != 0):
        right = (weight[row].double() @ moment)[kept]
        best[row, kept] = torch.linalg.solve(moment[kept][:, kept], right)
    assert found.loss >= output_error(weight - best, moment) * (1 - 1e-9)


def test_white_inputs_give_magnitude_and_no_update() -> None:
    weight = normal(8, 64)
    found = prune_compensated(weight, torch.eye(64, dtype=torch.float64), TWO_OF_FOUR)
    assert torch.equal(found.weight, weight * TWO_OF_FOUR.kept(weight.abs(), per_row=False))


def test_inputs_that_never_occur_and_fewer_rows_than_inputs() -> None:
    rows = correlated(20, 64)
    rows[:, 7] = 0
    found = prune_compensated(normal(8, 64), moment_of(rows), HALF)
    assert bool(torch.isfinite(found.weight).all())
    assert not found.weight[:, 7].any()


def test_the_preset_and_bad_options() -> None:
    specs = Recipe.load("sparsegpt-2to4").specs
    assert specs[-1].name == "prune-sparsegpt" and specs[-1].options["pattern"] == "2:4"
    with pytest.raises(UsageError, match="expected 'unstructured' or 'n:m'"):
        make_pass("prune-sparsegpt", {"pattern": "3:2"})
    with pytest.raises(UsageError, match="would empty every layer"):
        run_with(one_linear(), [correlated(4, 64)], ("prune-sparsegpt", {"ratio": 1.0}))
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("prune-sparsegpt", {})]).run(one_linear())
    said = make_pass("prune-sparsegpt", {}).notice("onnx")
    assert said is not None and "nothing faster" in said
