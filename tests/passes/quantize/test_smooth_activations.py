"""smooth-activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.passes.quantize._trials import rounded_error
from mopt.passes.quantize.smooth_activations import smoothing_factors
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import batches_for, run_with
from tests.tiny import normal, sample


def outliers() -> Sample:
    """A norm that makes one channel of 32 a hundred times larger, and a layer behind it."""
    layers = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 24))
    made = sample(layers, normal(64, 32), dynamic=True)
    with torch.no_grad():
        made.module[0].weight[3] = 100.0
    return made


def behind_gelu(largest: float) -> Sample:
    """A layer that reads a GELU, in which one channel of 64 is ``largest`` times the others."""
    layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 24))
    made = sample(layers, normal(64, 32), dynamic=True)
    with torch.no_grad():
        made.module[0].weight[3] *= largest
        made.module[2].weight[:, 3] /= largest
    return made


def calibrated(
    name: str, source: Callable[[], Sample], changed: bool, skipped: str = "", **options: object
) -> Case:
    made = source()
    program = made.capture()
    return Case(name, program, changed, options, skipped=skipped,
                calibration=lambda: Calibration(batches_for(made), program))  # fmt: skip


CASES = [
    calibrated("layer-norm", outliers, True),
    calibrated("given-strength", outliers, True, strength=0.5),
    calibrated("decoder", lambda: tiny.decoder(kv_heads=4), True, "has other readers"),
    calibrated("gelu-between", tiny.mlp, False, "does not let factors through"),
    calibrated("gelu-between-inserted", lambda: behind_gelu(100.0), True, insert=True, layers="2"),
    calibrated(
        "not-worth-inserting",
        lambda: behind_gelu(1.0),
        False,
        "outputs enough",
        insert=True,
        layers="2",
    ),
    calibrated("excluded", outliers, False, skip="1"),
]


def test_int8_loses_less_after_smoothing() -> None:
    program = outliers().capture()
    data = [normal(64, 32, seed=s) for s in range(3)]
    fresh = normal(500, 32, seed=9)
    wanted = program.run(fresh)
    rounding = ("quantize-dynamic", {"min_size": 0})
    plain = run_with(program, data, rounding)
    smooth = run_with(program, data, ("smooth-activations", {}), rounding)
    errors = [float((r.run(fresh) - wanted).square().mean()) for r in (plain, smooth)]
    assert errors[1] < 0.2 * errors[0]
    assert smooth.steps[0].stats["strength"]["1"] >= 0.3


def test_smoothing_narrows_the_spread_of_channels() -> None:
    rows = normal(200, 16) * torch.logspace(-1, 2, 16)
    weight = normal(8, 16, seed=1)
    factors = smoothing_factors(rows.abs().amax(0), weight.abs().amax(0), 0.5)
    spreads = [
        float(value.abs().amax(0).max() / value.abs().amax(0).median())
        for value in (rows, rows / factors)
    ]
    assert spreads[1] < 0.5 * spreads[0]
    assert rounded_error(rows / factors, [weight], factors.mul) < rounded_error(rows, [weight])


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_factors_are_positive_and_finite_for_dead_channels(strength: float) -> None:
    factors = smoothing_factors(torch.tensor([0.0, 1.0, 1e30]), torch.tensor([1.0, 0.0, 0.0]),
                                strength)  # fmt: skip
    assert bool(torch.isfinite(factors).all())
    assert bool((factors > 0).all())


def test_data_is_needed() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("smooth-activations", {})]).run(outliers().capture())
