"""split-outliers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.passes.quantize.split_outliers import clip_error, outlier_channels
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import batches_for, run_with
from tests.tiny import Apply, normal, sample

DYNAMIC = ("quantize-dynamic", {"min_size": 0})


def large_channel() -> Sample:
    """Two linears on one value whose channel 5 is forty times larger than the others."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        h = x * m.sizes
        return m.first(h) + m.second(h)

    layers = {"first": nn.Linear(32, 8), "second": nn.Linear(32, 8, bias=False)}
    made = sample(Apply(forward, **layers, sizes=torch.ones(32)), normal(3, 32), dynamic=True)
    made.module.sizes[5] = 40.0  # behind sample, which draws all weights
    return made


def rare(rows: int, seed: int) -> Tensor:
    """Normal rows in which one value in five hundred, anywhere, is eighty times larger."""
    values = normal(rows, 32, seed=seed)
    odd = torch.rand(rows, 32, generator=torch.Generator().manual_seed(seed)) < 0.002
    return torch.where(odd, 80 * values, values)


def calibrated(name: str, made: Sample, changed: bool, options: dict[str, object],
               **more: object) -> Case:  # fmt: skip
    program = made.capture()
    return Case(name, program, changed, options,
                calibration=lambda: Calibration(batches_for(made), program), **more)  # fmt: skip


CASES = [
    calibrated("channels", large_channel(), True, {"most": 0.1}),
    calibrated("values", tiny.linear(32, 8), True, {"by": "value", "keep": 1.0}),
    calibrated("no-outliers", tiny.linear(32, 8), False, {"most": 0.1}, skipped="leaves 100%"),
    calibrated("no-gain", tiny.linear(32, 8), False, {"by": "value", "keep": 0.1},
               skipped="a split leaves"),
]  # fmt: skip


def test_channels_are_those_above_the_threshold_and_not_too_many() -> None:
    values = [normal(50, 40, seed=s) * torch.linspace(0.1, 8, 40) for s in range(3)]
    largest = torch.cat(values).abs().amax(0)
    assert outlier_channels(values, 6.0, 1.0).tolist() == (largest > 6).nonzero()[:, 0].tolist()
    few = outlier_channels(values, 6.0, 0.1)
    assert set(few.tolist()) == set(largest.argsort(descending=True)[:4].tolist())
    assert len(outlier_channels(values, 1e9, 1.0)) == 0


def test_all_channels_apart_is_exact_and_none_changes_nothing() -> None:
    made = large_channel()
    program = made.capture()
    data = [normal(20, 32, seed=s) for s in range(2)]
    fresh = normal(8, 32, seed=7)
    options = {"threshold": 0.0, "most": 1.0, "keep": 1.0}
    every = run_with(program, data, ("split-outliers", options), DYNAMIC)
    none = run_with(program, data, ("split-outliers", {"threshold": 1e6}), DYNAMIC)
    plain = run_with(program, data, DYNAMIC)
    assert torch.equal(none.run(fresh), plain.run(fresh))
    wanted = program.run(fresh)
    errors = [float((one.run(fresh) - wanted).square().mean()) for one in (plain, every)]
    assert errors[1] < 1e-6 * errors[0]


@pytest.mark.parametrize("by", ["channel", "value"])
def test_int8_behind_a_split_is_closer(by: str) -> None:
    made = large_channel() if by == "channel" else tiny.linear(32, 16)
    program = made.capture()
    draw = (lambda rows, seed: normal(rows, 32, seed=seed)) if by == "channel" else rare
    data = [draw(100, seed) for seed in range(4)]
    fresh = draw(400, 9)
    wanted = program.run(fresh)
    options = {"by": by, "most": 0.05, "keep": 0.6}
    split = run_with(program, data, ("split-outliers", options), DYNAMIC)
    plain = run_with(program, data, DYNAMIC)
    errors = [float((one.run(fresh) - wanted).square().mean()) for one in (plain, split)]
    assert errors[1] < 0.6 * errors[0]
    left = list(split.steps[-2].stats["error_left"].values())
    assert len(left) == 1 and left[0] < 0.6
    # By value, both calls of a layer read the same codes; by channel, the float part is small.
    codes = [t for path, t in split.weights().items() if path.endswith("codes")]
    assert len(codes) == (2 if by == "channel" else 1)


def test_a_split_by_value_is_never_worse_than_none_on_its_rows() -> None:
    for seed in range(3):
        rows, weight = normal(60, 24, seed=seed), normal(8, 24, seed=9)
        left, limit = clip_error(rows, [weight])
        assert 0 < left <= 1.0
        assert 0 < limit <= float(rows.abs().max())
    assert clip_error(torch.zeros(4, 24), [normal(8, 24)])[0] == 1.0


def test_data_is_needed() -> None:
    with pytest.raises(PassError, match="needs calibration data") as missing:
        Pipeline([make_pass("split-outliers", {})]).run(tiny.linear(32, 8).capture())
    assert missing.value.code == "pass-requires"
