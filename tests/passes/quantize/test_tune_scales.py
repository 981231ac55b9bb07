"""tune-scales."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import correlated, one_linear, run_with
from tests.tiny import normal, sample

INT4 = ("quantize-weights", {"bits": 4, "group": 16, "min_size": 0})


def rounded(made: Sample) -> Case:
    """A case on the rounded sample, with the sample itself as the program before rounding."""
    program = made.capture()
    result = Pipeline([make_pass(*INT4)]).run(program)
    return Case(
        "int4-mlp", result, True, {"steps": 30, "rate": 0.005}, tolerance=0.2,
        calibration=lambda: Calibration([(normal(64, 16, seed=s),) for s in range(8)], result),
        context={"unrounded": program},
    )  # fmt: skip


CASES = [
    rounded(tiny.mlp()),
    Case("nothing-rounded", tiny.mlp(), False,
         calibration=lambda: [(normal(4, 16),)], context={}),
]  # fmt: skip


def two_layers() -> Program:
    layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False))
    return sample(layers, correlated(2, 64), dynamic=True).capture()


def codes(program: Program) -> dict[str, torch.Tensor]:
    return {path: t for path, t in program.weights().items() if t.dtype == torch.uint8}


def test_codes_stay_and_outputs_come_closer() -> None:
    program = two_layers()
    data = [correlated(100, 64, seed=s) for s in range(8)]
    fresh = correlated(500, 64, seed=99)
    options = {"bits": 2, "group": 32, "min_size": 0, "symmetric": False}
    before = run_with(program, data, ("quantize-weights", options))
    tuning = ("tune-scales", {"steps": 60, "rate": 0.01})
    after = run_with(program, data, ("quantize-weights", options), tuning)
    assert list(codes(before)) == list(codes(after))
    assert all(torch.equal(codes(before)[path], codes(after)[path]) for path in codes(before))
    assert after.size_bytes() == before.size_bytes()
    wanted = program.run(fresh).log_softmax(-1)
    found = [one.run(fresh).log_softmax(-1) for one in (before, after)]
    distance = [float((wanted.exp() * (wanted - one)).sum(-1).mean()) for one in found]
    assert distance[1] < 0.9 * distance[0]
    said = after.steps[-1].stats["divergence"]
    assert said["after"] < said["before"]


def test_without_progress_on_held_out_data_nothing_changes() -> None:
    program, data = two_layers(), [correlated(40, 64, seed=s) for s in range(8)]
    result = run_with(program, data, INT4, ("tune-scales", {"steps": 3, "rate": 1.0}))
    assert not result.steps[-1].changed
    assert "did not help" in result.steps[-1].skipped[0].reason


def test_int8_layers_pass_gradients_and_static_values_do_not() -> None:
    program, data = two_layers(), [correlated(40, 64, seed=s) for s in range(8)]
    mixed = [
        ("quantize-weights", {"bits": 2, "group": 32, "min_size": 0, "layers": "0"}),
        ("quantize-dynamic", {"min_size": 0}),
    ]
    result = run_with(program, data, *mixed, ("tune-scales", {"steps": 30, "rate": 0.01}))
    assert result.steps[-1].changed
    static = [mixed[0], ("quantize-static", {}), ("tune-scales", {"steps": 3})]
    stays = run_with(program, data, *static)
    assert "static 8-bit values" in stays.steps[-1].skipped[0].reason


def test_outputs_that_are_no_logits_are_matched_as_they_are() -> None:
    made = sample(
        nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)), correlated(2, 32), dynamic=True
    )
    data = [correlated(64, 32, seed=s) for s in range(8)]
    options = {"bits": 2, "group": 32, "min_size": 0}
    program = made.capture()
    result = run_with(
        program, data, ("quantize-weights", options), ("tune-scales", {"steps": 40, "rate": 0.01})
    )
    said = result.steps[-1].stats["divergence"]
    assert 0 < said["after"] < said["before"] < 1


def test_data_is_needed() -> None:
    with pytest.raises(PassError, match="needs calibration data") as missing:
        Pipeline([make_pass("tune-scales", {})]).run(one_linear(), PassContext())
    assert missing.value.code == "pass-requires"
