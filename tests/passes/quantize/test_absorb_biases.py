"""absorb-biases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mopt.calibration import Calibration
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import run_with
from tests.tiny import normal, sample


def high(*layers: nn.Module, x: torch.Tensor) -> Sample:
    """A chain whose first layer has some biases far above what its weights give."""
    made = sample(nn.Sequential(*layers), x, dynamic=True)
    with torch.no_grad():
        made.module[0].bias.copy_(torch.linspace(-1, 40, len(made.module[0].bias)))
    return made


def convolutions() -> Sample:
    return high(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(),
                nn.Conv2d(8, 6, 1), x=normal(2, 4, 8, 8))  # fmt: skip


def linears() -> Sample:
    return high(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False), x=normal(3, 8))


def padded() -> Sample:
    return high(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), x=normal(2, 4, 6, 6))


def leaky() -> Sample:
    return high(nn.Linear(8, 16), nn.LeakyReLU(0.1), nn.Linear(16, 4), x=normal(3, 8))


def low() -> Sample:
    return sample(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), normal(3, 8),
                  dynamic=True)  # fmt: skip


def calibrated(name: str, made: Sample, changed: bool, **more: object) -> Case:
    program = made.capture()
    shape = made.inputs[0].shape[1:]
    data = [(normal(16, *shape, seed=s),) for s in range(2)]
    return Case(name, program, changed, {"deviations": 6.0},
                calibration=lambda: Calibration(data, program), **more)  # fmt: skip


# Six deviations below the mean nothing is cut off.
CASES = [
    calibrated("convolutions", convolutions(), True, tolerance=1e-4),
    calibrated("linears-without-bias", linears(), True, tolerance=1e-4),
    calibrated("low-biases", low(), False),
    calibrated("padding", padded(), False, skipped="pads its input"),
    calibrated("leaky-relu", leaky(), False, skipped="no relu before it"),
    Case("no-data", linears, False, skipped="no data is given"),
]


@pytest.mark.parametrize("made", [convolutions(), linears()])
def test_the_value_between_loses_range_and_the_output_stays(made: Sample) -> None:
    program = made.capture()
    shape = made.inputs[0].shape[1:]
    result = run_with(program, [normal(64, *shape, seed=1)], ("absorb-biases", {"deviations": 6}))
    fresh = normal(64, *shape, seed=2)
    wanted, found = program.run(fresh), result.run(fresh)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())

    def between(one: object) -> float:
        values = []
        one.interpret(lambda node, value: values.append(value) if "relu" in node.name else None,
                      (fresh,))  # fmt: skip
        return float(values[0].max())

    assert between(result) < 0.5 * between(program)


def test_folded_batch_norms_say_what_data_would() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    made = sample(layers, normal(2, 4, 6, 6), dynamic=True)
    with torch.no_grad():  # behind sample, which draws all weights
        layers[1].weight.copy_(torch.linspace(-0.5, 0.5, 8))
        layers[1].bias.copy_(torch.linspace(-2, 10, 8))
    program = made.capture()
    folded = [make_pass("fold-batch-norm", {}), make_pass("equalize-channels", {})]
    before = Pipeline(folded).run(program)
    after = Pipeline([*folded, make_pass("absorb-biases", {})]).run(program)
    assert after.steps[-1].stats["layers"] == 1
    shift = before.weights(), after.weights()
    first = [next(t for path, t in w.items() if path.startswith("0.bias")) for w in shift]
    # Equalization divides a channel by its factor, and with it the mean and the deviation.
    weights = [next(t for path, t in before.weights().items() if path.startswith("0.weight"))]
    plain = Pipeline(folded[:1]).run(program).weights()
    original = next(t for path, t in plain.items() if path.startswith("0.weight"))
    factors = (original.flatten(1).abs().amax(1) / weights[0].flatten(1).abs().amax(1)).double()
    amount = (layers[1].bias.double() - 3 * layers[1].weight.double().abs()) / factors
    assert torch.allclose((first[0] - first[1]).double(), amount.clamp(min=0), rtol=1e-4, atol=1e-5)
