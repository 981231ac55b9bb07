"""prune-weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mopt.calibration import Calibration
from mopt.errors import PassError, UsageError
from mopt.passes.prune._masks import Pattern
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import batches_for, correlated, one_linear, run_with
from tests.tiny import normal, sample

SMALL = {"min_size": 0}


def case(name: str, made: Sample, changed: bool, options: dict[str, Any], **more: Any) -> Case:
    program = made.capture()
    data = Calibration(batches_for(made), program)
    return Case(name, program, changed, SMALL | options, calibration=lambda: data, **more)


# Half of random weights are zero: what is lost is of the size of the outputs.
CASES = [
    case("wanda", tiny.mlp(), True, {}, tolerance=1.0),
    case("magnitude-2-of-4", tiny.mlp(), True, {"pattern": "2:4", "importance": "magnitude"},
         tolerance=1.0),
    case("convolutions", tiny.small_cnn(), True, {"ratio": 0.3}, tolerance=1.0),
    case("nothing-asked", tiny.mlp(), False, {"ratio": 0.0}, skipped="those zeros already"),
    case("head-stays", tiny.linear(), False, {}, skipped="the model's head"),
    case("no-groups-of-four", tiny.mlp(18), False, {"pattern": "2:4", "layers": "0"},
         skipped="18 inputs are not a multiple of 4"),
    case("small-layers-stay", tiny.mlp(), False, {"min_size": 1 << 20}, skipped="fewer than"),
]  # fmt: skip


def test_patterns_keep_the_largest_and_exactly_so_many() -> None:
    scores = normal(6, 24).abs()
    rows = Pattern(0.25).kept(scores, per_row=True)
    assert (rows.sum(1) == 18).all()
    whole = Pattern(0.25).kept(scores, per_row=False)
    assert int(whole.sum()) == 108
    assert float(scores[whole].min()) >= float(scores[~whole].max())
    groups = Pattern.parse("x", "2:4", 0.0).kept(scores, per_row=False).unflatten(1, (-1, 4))
    assert (groups.sum(2) == 2).all()
    ties = Pattern.parse("x", "1:4", 0.0).kept(torch.ones(2, 8), per_row=False)
    assert ties.tolist() == [[True, False, False, False] * 2] * 2


def zeros_of(options: dict[str, Any], batches: list[torch.Tensor], scale: torch.Tensor) -> Any:
    """Where the first layer has zeros, with its inputs scaled up and its columns down."""
    layers = nn.Sequential(nn.Linear(32, 16, bias=False), nn.ReLU(), nn.Linear(16, 4))
    made = sample(layers, correlated(2, 32), dynamic=True)
    with torch.no_grad():
        layers[0].weight.div_(scale)
    result = run_with(made.capture(), [b * scale for b in batches], ("prune-weights", options))
    return next(t for n, t in result.weights().items() if n.startswith("0.weight")) == 0


def test_wanda_does_not_depend_on_how_inputs_are_scaled_and_magnitude_does() -> None:
    batches, ones = [correlated(100, 32)], torch.ones(32)
    scale = torch.linspace(0.25, 4, 32)
    wanda, magnitude = SMALL | {"importance": "wanda"}, SMALL | {"importance": "magnitude"}
    assert torch.equal(zeros_of(wanda, batches, ones), zeros_of(wanda, batches, scale))
    assert not torch.equal(zeros_of(magnitude, batches, ones), zeros_of(magnitude, batches, scale))
    assert (zeros_of(wanda, batches, ones).sum(1) == 16).all()


def test_bad_options_and_missing_data_and_the_notice() -> None:
    for pattern in ("4:2", "2:", "0:4", "half"):
        with pytest.raises(UsageError, match="expected 'unstructured' or 'n:m'"):
            make_pass("prune-weights", {"pattern": pattern})
    with pytest.raises(UsageError, match="would empty every layer") as caught:
        run_with(one_linear(), [correlated(4, 64)], ("prune-weights", {"ratio": 1.0}))
    assert caught.value.code == "empties-layer"
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("prune-weights", {"importance": "wanda"})]).run(one_linear())
    said = make_pass("prune-weights", {}).notice("onnx")
    assert said is not None and "nothing faster" in said and "size only" in said
