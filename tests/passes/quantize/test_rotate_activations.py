"""rotate-activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.passes.quantize.rotate_activations import (
    Rotation,
    deal,
    error_left,
    hadamard,
    rotate,
)
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import batches_for, one_linear, run_with
from tests.tiny import normal


def spiky(rows: int, seed: int = 0) -> Tensor:
    """Small values with one of 8 or -8 in each row of 64, in changing places."""
    values, at = 0.05 * normal(rows, 64, seed=seed), torch.arange(rows)
    values[at, at * 7 % 64] += 8.0 * normal(rows, seed=seed + 50).sign()
    return values


def calibrated(
    name: str, made: Sample, changed: bool, skipped: str = "", **options: object
) -> Case:
    program = made.capture()
    return Case(name, program, changed, options, skipped=skipped,
                calibration=lambda: Calibration(batches_for(made), program))  # fmt: skip


def clustered(rows: int, seed: int = 0) -> Tensor:
    """64 channels of which the first eight are always large, in signs that change."""
    values = normal(rows, 64, seed=seed)
    values[:, :8] = 30 * values[:, :8].sign() + values[:, :8]
    return values


CASES = [
    Case("spikes", one_linear, True, {},
         calibration=lambda: Calibration([(spiky(64),)], one_linear())),
    calibrated("normal-values", tiny.mlp(), False, "of the error", keep=0.5),
    calibrated("ragged", tiny.linear(40, 8), False, "not a multiple of block 32"),
    calibrated("excluded", tiny.mlp(), False, skip="*"),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 16, 128])
def test_the_matrix_is_orthogonal(size: int) -> None:
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_one_large_value_is_spread_over_its_block() -> None:
    rows = torch.zeros(4, 64)
    rows[:, 5] = 8.0
    turned = rotate(rows, hadamard(16).float())
    assert float(turned.abs().max()) == pytest.approx(2.0)
    assert float(turned.square().sum()) == pytest.approx(float(rows.square().sum()))
    assert error_left(spiky(256), [normal(8, 64, seed=1)], Rotation(hadamard(32))) < 0.3


@pytest.mark.parametrize("twice", [False, True])
def test_every_rotation_leaves_products_as_they_are(twice: bool) -> None:
    rows, weight = clustered(40).double(), normal(8, 64, seed=1).double()
    order = deal(rows.abs().amax(0), 16)
    assert order.sort().values.tolist() == list(range(64))
    assert [sum(at < 8 for at in block) for block in order.view(4, 16).tolist()] == [2, 2, 2, 2]
    rotation = Rotation(hadamard(16), order, twice)
    found = rotation(rows) @ rotation(weight).t()
    assert torch.allclose(found, rows @ weight.t(), rtol=1e-10, atol=1e-10)


def test_channels_that_are_always_large_are_spread_over_the_blocks() -> None:
    stats = {}
    for kind in ("adaptive", "hadamard"):
        step = ("rotate-activations", {"kind": kind, "block": 16})
        stats[kind] = run_with(one_linear(), [clustered(64)], step).steps[-1].stats
    assert set(stats["adaptive"]["kinds"].values()) < {"dealt", "dual"}
    left = {kind: next(iter(found["error_left"].values())) for kind, found in stats.items()}
    assert left["adaptive"] < 0.5 * left["hadamard"]


def test_int8_loses_less_after_rotating() -> None:
    program = one_linear()
    fresh = spiky(500, seed=9)
    wanted = program.run(fresh)
    rounding = ("quantize-dynamic", {"min_size": 0})
    data = [spiky(64, seed=s) for s in range(3)]
    plain = run_with(program, data, rounding)
    turned = run_with(program, data, ("rotate-activations", {}), rounding)
    errors = [float((r.run(fresh) - wanted).square().mean()) for r in (plain, turned)]
    assert errors[1] < 0.3 * errors[0]


def test_data_is_needed() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("rotate-activations", {})]).run(one_linear())
