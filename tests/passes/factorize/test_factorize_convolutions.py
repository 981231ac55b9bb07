"""factorize-convolutions."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.case import Case, Sample, outputs
from tests.passes.prune.costs import BlockModel
from tests.passes.quantize.calibrated import batches_for
from tests.tiny import Apply, normal, sample

SMALL = {"min_size": 0, "multiple": 2}
TABLE = {"cost_model": BlockModel(1)}


def between(layer: nn.Module, channels: int, after: int, size: tuple[int, ...] = (8, 8)) -> Sample:
    """A convolution with something before and a head behind it."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.out(m.layer(torch.relu(x)).relu().flatten(2).mean(2))

    return sample(
        Apply(forward, layer=layer, out=nn.Linear(after, 3)), normal(2, channels, *size),
        dynamic=True,
    )  # fmt: skip


def plain(ins: int = 12, outs: int = 16, window: int = 3, **options: Any) -> Sample:
    return between(nn.Conv2d(ins, outs, window, **options), ins, outs)


def case(name: str, made: Sample, changed: bool, options: dict[str, Any], **more: Any) -> Case:
    program = made.capture()
    data = Calibration(batches_for(made), program)
    return Case(name, program, changed, SMALL | options, calibration=lambda: data,
                **{"context": TABLE, **more})  # fmt: skip


# Random kernels have no low rank: what is lost is of the size of what a layer gives.
CASES = [
    case("window", plain(padding=1), True, {}, tolerance=0.9),
    case("strided-and-dilated", plain(stride=2, padding=2, dilation=2), True,
         {"method": "plain", "refit": False}, tolerance=0.9),
    case("same-padding", plain(padding="same"), True, {}, tolerance=0.9),
    case("one-place", plain(window=1, stride=2), True, {}, tolerance=0.9),
    case("volume", between(nn.Conv3d(8, 8, 3), 8, 8, (5, 5, 5)), True, {}, tolerance=0.9),
    case("sequence", between(nn.Conv1d(8, 12, 5), 8, 12, (16,)), True, {"aim": "latency"},
         tolerance=0.9),
    case("nothing-asked", plain(), False, {"ratio": 0.0}),
    case("groups", plain(groups=2), False, {}, skipped="its groups read different inputs"),
    case("transposed", between(nn.ConvTranspose2d(8, 8, 2), 8, 8), False, {},
         skipped="transposed convolutions"),
    case("small", plain(), False, {"min_size": 4096}, skipped="fewer than min_size"),
    case("narrow", plain(), False, {"multiple": 16}, skipped="no smaller multiple of 16"),
    case("no-faster", plain(), False, {}, context={"cost_model": BlockModel(64)},
         skipped="not estimated to be faster"),
]  # fmt: skip


def factorize(program: Program, data: Calibration | None = None, **options: Any) -> Program:
    ctx = PassContext(calibration=data, cost_model=BlockModel(1))
    return Pipeline([make_pass("factorize-convolutions", SMALL | options)]).run(program, ctx)


@pytest.mark.parametrize("made", [plain(padding=1), plain(window=1)])
def test_the_predicted_error_is_that_of_the_kernel_the_thin_layers_stand_for(made: Sample) -> None:
    program = made.capture()
    result = factorize(program, method="plain", ratio=0.5)
    (error,) = result.steps[-1].stats["predicted_error"].values()
    weights = [t.double() for n, t in result.weights().items() if n.startswith("layer.weight_")]
    if len(weights) == 3:
        kernel = torch.einsum("pqhw,qi,op->oihw", weights[1], weights[0].flatten(1),
                              weights[2].flatten(1))  # fmt: skip
    else:
        kernel = (weights[1].flatten(1) @ weights[0].flatten(1))[..., None, None]
    whole = made.module.layer.weight.detach().double()
    assert float((kernel - whole).square().sum() / whole.square().sum()) == pytest.approx(error)


def test_budgets_of_parameters_and_of_time_hold() -> None:
    made = sample(nn.Sequential(nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(),
                                nn.Conv2d(24, 32, 1), nn.ReLU(), nn.Conv2d(32, 2, 1)),
                  normal(1, 16, 10, 10))  # fmt: skip
    program = made.capture()
    size = 16 * 24 * 9 + 24 * 24 * 9 + 24 * 32
    result = factorize(program, ratio=0.45)
    assert program.parameter_count() - result.parameter_count() >= 0.45 * size
    quicker = factorize(program, ratio=0.45, aim="latency")
    assert quicker.flops() < 0.6 * program.flops()


def test_data_and_fitting_lower_the_error() -> None:
    made = plain(16, 16, padding=1)
    program = made.capture()
    data = Calibration(batches_for(made, 8), program)
    args = batches_for(made, 9)[-1]
    expected = outputs(program, args, {})[0]

    def error(**options: Any) -> float:
        result = factorize(program, data, ratio=0.5, **options)
        return float((outputs(result, args, {})[0] - expected).square().mean())

    alone = error(method="plain", refit=False)
    assert error(method="plain") < alone


@pytest.mark.parametrize(("options", "reason"), [
    ({"ratio": 1.0}, "no component"), ({"ratio": 1.5}, "option ratio"),
])  # fmt: skip
def test_bad_ratios(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        factorize(plain().capture(), **options)


def test_whitening_needs_data() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        factorize(plain().capture(), method="whitened")


def test_layers_called_twice_share_the_thin_ones() -> None:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.out(m.layer(m.layer(x).relu()).flatten(2).mean(2))

    parts: dict[str, Callable[..., Any] | nn.Module]
    parts = {"layer": nn.Conv2d(8, 8, 3, padding=1), "out": nn.Linear(8, 2)}
    program = sample(Apply(forward, **parts), normal(1, 8, 6, 6)).capture()
    result = factorize(program, ratio=0.5)
    assert len([n for n in result.weights() if n.startswith("layer.weight_")]) == 3
    calls = [n for n in result.graph.nodes if "conv2d" in str(n.target)]
    assert len(calls) == 6
