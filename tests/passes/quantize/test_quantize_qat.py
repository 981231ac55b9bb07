"""quantize-qat."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mopt.calibration import Calibration
from mopt.errors import InputError, PassError
from mopt.formats.int_blocks import IntBlocks
from mopt.passes.quantize.quantize_qat import TrainedRounding
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import batches_for, correlated, one_linear, run_with
from tests.tiny import normal, sample

SMALL = {"min_size": 0, "steps": 5}


def calibrated(name: str, source: object, changed: bool, options: dict[str, object],
               **more: object) -> Case:  # fmt: skip
    made = source() if callable(source) else source
    assert isinstance(made, Sample)
    program = made.capture()
    return Case(name, program, changed, SMALL | options,
                calibration=lambda: Calibration(batches_for(made), program), **more)  # fmt: skip


# Two bits of random weights keep little; the bounds are those of rounding them to nearest.
CASES = [
    calibrated("int2", tiny.mlp(32, 64), True, {"group": 32}, tolerance=1.5),
    calibrated("int4-symmetric", tiny.mlp(), True, {"bits": 4, "group": 16, "symmetric": True},
               tolerance=0.4),
    calibrated("decoder-int3", tiny.decoder, True, {"bits": 3, "group": 16, "start": "nearest"},
               tolerance=0.8, skipped="not embeddings"),
    calibrated("small-layers-stay", tiny.mlp(), False, {"min_size": 4096}, skipped="fewer than"),
    calibrated("mostly-padding", tiny.linear(20, 8), False, {}, skipped="padding"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["int2-g32-asym", "int4-g16", "int3-channel", "int8-g32"])
def test_untrained_it_is_rounding_to_nearest_bit_for_bit(name: str) -> None:
    form = IntBlocks.parse(name)
    assert form is not None
    weight = normal(8, 80)
    grid = form.grid(weight, ranges="min-max")
    nearest = form.decode(form.encode(weight, grid=grid))
    part = TrainedRounding(weight, nearest, form, grid, 0.01, 0.01)
    assert torch.equal(part.weight(), nearest)
    found, same = part.final()
    assert torch.equal(form.decode(form.encode(found, grid=same)), nearest)


def test_what_is_stored_is_what_was_trained() -> None:
    form, weight = IntBlocks(3, 16, asymmetric=True), normal(8, 48)
    start = form.decode(form.encode(weight))
    part = TrainedRounding(weight, start, form, form.grid(weight), 0.01, 0.01)
    optimizer = torch.optim.Adam(part.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        (part.weight() - normal(8, 48, seed=1)).square().sum().backward()
        optimizer.step()
    trained = part.weight().detach()
    assert not torch.equal(trained, form.decode(form.encode(weight)))
    found, grid = part.final()
    assert torch.equal(form.decode(form.encode(found, grid=grid)), trained)
    assert grid.zero_points is not None
    assert torch.equal(grid.zero_points, grid.zero_points.round())


def test_other_codes_to_start_from_are_kept() -> None:
    form, weight = IntBlocks(4, 16), normal(4, 32)
    grid = form.grid(weight)
    other = form.quantize_columns(weight + 0.5 * grid.scales.abs().mean(), grid, 16, 0)
    part = TrainedRounding(weight, other, form, grid, 0.01, 0.01)
    assert torch.equal(part.weight(), other)


def test_training_lowers_the_error_of_the_output() -> None:
    layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False))
    program = sample(layers, correlated(2, 64), dynamic=True).capture()
    data = [correlated(200, 64, seed=s) for s in range(4)]
    fresh = correlated(500, 64, seed=9)
    wanted = program.run(fresh)
    options = {"bits": 3, "group": 32, "activations": "float", "min_size": 0}
    error = {}
    training = {"steps": 150, "symmetric": True, "start": "nearest"}
    for name, more in [("quantize-weights", {}), ("quantize-qat", training)]:
        result = run_with(program, data, (name, options | more))
        error[name] = float((result.run(fresh) - wanted).square().mean())
    assert error["quantize-qat"] < 0.85 * error["quantize-weights"]


def test_bad_input_is_refused() -> None:
    with pytest.raises(PassError, match="needs calibration data") as missing:
        Pipeline([make_pass("quantize-qat", SMALL)]).run(one_linear())
    assert missing.value.code == "pass-requires"
    layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    made = sample(layers, normal(2, 32), dynamic=True, scale=100.0)
    with pytest.raises(InputError, match="NaN or infinity"):
        run_with(
            made.capture(), [torch.full((4, 32), 1e37)], ("quantize-qat", SMALL | {"group": 32})
        )


def test_all_zero_groups_and_one_row_stay_finite() -> None:
    program = one_linear()
    weight = program.weights()["weight"]
    with torch.no_grad():
        weight[:, :32] = 0
    options = {"bits": 2, "group": 32, "min_size": 0, "steps": 10}
    result = run_with(program, [correlated(1, 64)], ("quantize-qat", options))
    assert all(bool(t.float().isfinite().all()) for t in result.weights().values())
    assert bool(result.run(correlated(4, 64)).isfinite().all())
