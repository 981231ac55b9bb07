"""factorize-linears."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mopt.calibration import Calibration
from mopt.errors import PassError, UsageError
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample, outputs
from tests.passes.prune.costs import BlockModel
from tests.passes.quantize.calibrated import batches_for, correlated
from tests.tiny import Apply, normal, sample

SMALL = {"min_size": 0, "multiple": 2}
TABLE = {"cost_model": BlockModel(1)}


def calibrated(
    name: str, made: Sample, changed: bool, options: dict[str, Any], **more: Any
) -> Case:
    program = made.capture()
    data = Calibration(batches_for(made), program)
    return Case(name, program, changed, SMALL | options, calibration=lambda: data,
                **{"context": TABLE, **more})  # fmt: skip


def called_twice() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.out(m.layer(torch.relu(m.layer(x))))

    parts = {"layer": nn.Linear(32, 32), "out": nn.Linear(32, 4)}
    return sample(Apply(forward, **parts), normal(3, 32), dynamic=True)


def shared_with_a_product() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.out(torch.relu(m.layer(x)) * m.layer.weight.sum())

    parts = {"layer": nn.Linear(32, 32), "out": nn.Linear(32, 4)}
    return sample(Apply(forward, **parts), normal(3, 32), dynamic=True)


# Random weights have no low rank: half of the parameters lose about half of the output's size.
CASES = [
    calibrated("whitened", tiny.mlp(16, 64), True, {"ratio": 0.4}, tolerance=0.9),
    calibrated("activation", tiny.mlp(16, 64), True, {"method": "activation"}, tolerance=0.9),
    calibrated("fisher", tiny.mlp(16, 64), True, {"method": "fisher"}, tolerance=0.9),
    calibrated("fitted", tiny.mlp(16, 64), True, {"refit": True, "ratio": 0.4}, tolerance=0.9),
    calibrated("two-calls-share-factors", called_twice(), True,
               {"method": "plain", "ratio": 0.2}, tolerance=0.9),
    calibrated("decoder", tiny.decoder(), True, {"ratio": 0.3, "ranks": "uniform"},
               tolerance=0.9),
    calibrated("head-stays", tiny.linear(32, 32), False, {}, skipped="the model's head"),
    calibrated("small-layers-stay", tiny.mlp(), False, {"min_size": 4096}, skipped="fewer than"),
    calibrated("no-rank-saves", tiny.mlp(16, 16), False, {"multiple": 8}, skipped="a rank of 8"),
    calibrated("shared-stays", shared_with_a_product(), False, {}, skipped="used elsewhere"),
    calibrated("no-faster", tiny.mlp(16, 64), False, {"ratio": 0.1, "multiple": 1},
               context={"cost_model": BlockModel(32)}, skipped="not estimated to be faster"),
]  # fmt: skip


def three_layers() -> tuple[Program, Calibration]:
    layers = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 4))
    made = sample(layers, correlated(2, 64), dynamic=True)
    program = made.capture()
    return program, Calibration([(correlated(300, 64, seed=s),) for s in range(3)], program)


def factorize(program: Program, data: Calibration, **options: Any) -> Program:
    ctx = PassContext(calibration=data, cost_model=BlockModel(1))
    return Pipeline([make_pass("factorize-linears", SMALL | options)]).run(program, ctx)


def layer_errors(program: Program, result: Program, data: Calibration) -> dict[str, float]:
    """Relative squared errors of each factorized layer on the inputs of the original."""
    sources: dict[str, list[tuple[Tensor, Tensor]]] = {}
    weights: dict[str, tuple[Tensor, Tensor | None]] = {}
    calls = [n for n in program.graph.nodes if "linear" in str(n.target)]
    for name, call in zip(("0", "2"), calls, strict=False):
        weights[name] = program.weight(call.args[1]), None
        for args, kwargs in data:
            program.interpret(
                lambda node, value, want=call.args[0], into=name: sources.setdefault(
                    into, []).append((value,)) if node is want else None, args, kwargs
            )  # fmt: skip
    found = {}
    for name, (weight, _) in weights.items():
        first = next(t for path, t in result.weights().items() if path == f"{name}.weight_first")
        second = next(t for path, t in result.weights().items() if path == f"{name}.weight_second")
        x = torch.cat([value for (value,) in sources[name]]).double()
        lost = x @ (weight.double() - second.double() @ first.double()).t()
        found[name] = float(lost.square().sum() / (x @ weight.double().t()).square().sum())
    return found


def test_the_predicted_error_of_every_layer_is_the_measured_one() -> None:
    program, data = three_layers()
    result = factorize(program, data, ratio=0.3)
    predicted = result.steps[-1].stats["predicted_error"]
    measured = layer_errors(program, result, data)
    assert set(predicted) == set(measured) == {"0", "2"}
    for path, error in predicted.items():
        assert error == pytest.approx(measured[path], rel=0.01)


def test_the_share_asked_for_is_removed_and_ranks_are_multiples() -> None:
    program, data = three_layers()
    for options in ({"ranks": "allocated"}, {"ranks": "uniform"}):
        result = factorize(program, data, ratio=0.35, multiple=4, **options)
        stats = result.steps[-1].stats
        size = 2 * 64 * 96
        removed = program.parameter_count() - result.parameter_count()
        assert 0.35 <= removed / size <= 0.45
        assert stats["removed_of_layers"] == pytest.approx(removed / size)
        assert all(rank % 4 == 0 for rank in stats["ranks"].values())


def test_whitening_and_fitting_lower_the_error_of_the_model() -> None:
    program, data = three_layers()
    args = (correlated(200, 64, seed=9),)
    expected = outputs(program, args, {})[0]

    def error(**options: Any) -> float:
        result = factorize(program, data, ratio=0.4, ranks="uniform", **options)
        return float((outputs(result, args, {})[0] - expected).square().mean())

    plain, whitened, fitted = error(method="plain"), error(), error(refit=True)
    assert whitened < 0.8 * plain
    assert fitted < whitened


def test_bad_ratios_and_missing_data() -> None:
    program, data = three_layers()
    with pytest.raises(UsageError, match="no rank to any layer") as caught:
        factorize(program, data, ratio=1.0)
    assert caught.value.code == "empties-layer"
    with pytest.raises(UsageError, match="option ratio"):
        make_pass("factorize-linears", {"ratio": 1.2})
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("factorize-linears", {})]).run(program)
