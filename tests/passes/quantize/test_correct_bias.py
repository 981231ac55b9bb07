"""correct-bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.frontend import capture
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case
from tests.passes.quantize.calibrated import one_linear, run_with
from tests.tiny import normal

ROUND = ("quantize-weights", {"bits": 2, "group": 32, "min_size": 0})
BATCH = {0: torch.export.Dim("batch")}


def shifted(rows: int, seed: int = 0) -> Tensor:
    """Inputs whose means are far from zero, so that errors of weights move the outputs' means."""
    return normal(rows, 64, seed=seed) + 2.0


def two_layers(*, bias: bool) -> Program:
    layers = nn.Sequential(nn.Linear(64, 48, bias=bias), nn.GELU(), nn.Linear(48, 16, bias=bias))
    with torch.no_grad():
        for number, layer in enumerate((layers[0], layers[2])):
            layer.weight.copy_(normal(*layer.weight.shape, seed=number) / 8)
    return capture(layers.eval(), (shifted(2),), (BATCH,))


def mean_errors(program: Program, original: Program, data: list[Tensor]) -> Tensor:
    now, then = (torch.cat([p.run(batch) for batch in data]) for p in (program, original))
    return ((now - then).double().mean(0) / then.double().std(0)).abs()


def calibrated(source: Program) -> Calibration:
    return Calibration([(normal(8, *source.args[0].shape[1:]),)], source)


def rounded(*, bias: bool) -> Case:
    """Two layers that were rounded to 2 bits, with the program before as what to compare with."""
    original = two_layers(bias=bias)
    program = Pipeline([make_pass(*ROUND)]).run(original)
    return Case("with-biases" if bias else "without", program, True, tolerance=0.6,
                calibration=lambda: Calibration([(shifted(64),)], program),
                context={"unrounded": original})  # fmt: skip


CASES = [
    rounded(bias=True),
    rounded(bias=False),
    Case("nothing-rounded", tiny.mlp, False,
         calibration=lambda: calibrated(tiny.mlp().capture())),
    Case("no-linears", tiny.conv_bn_relu, False,
         calibration=lambda: calibrated(tiny.conv_bn_relu().capture())),
]  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rounding", [ROUND, ("quantize-dynamic", {"min_size": 0})])
def test_means_agree_on_the_calibration_data(
    bias: bool, rounding: tuple[str, dict[str, object]]
) -> None:
    program, data = two_layers(bias=bias), [shifted(64, seed=s) for s in range(3)]
    plain = run_with(program, data, rounding)
    corrected = run_with(program, data, rounding, ("correct-bias", {"smallest": 0.0}))
    before, after = mean_errors(plain, program, data), mean_errors(corrected, program, data)
    assert float(after.max()) < 1e-3
    assert float(after.max()) < 0.5 * float(before.max())


def test_layers_with_static_ranges_keep_their_integer_kernel() -> None:
    program, data = two_layers(bias=False), [shifted(64)]
    static: tuple[str, dict[str, object]] = ("quantize-static", {})
    kept = run_with(program, data, static, ("correct-bias", {"smallest": 0.0}))
    assert kept.text() == run_with(program, data, static).text()
    skipped = {skip.site: skip.reason for skip in kept.steps[-1].skipped}
    assert skipped == dict.fromkeys(("0", "2"), "its integer kernel takes no float bias")


def test_new_inputs_gain_too() -> None:
    program, data = two_layers(bias=True), [shifted(64, seed=s) for s in range(3)]
    fresh = shifted(500, seed=9)
    wanted = program.run(fresh)
    errors = [
        float((run_with(program, data, *steps).run(fresh) - wanted).square().mean())
        for steps in ((ROUND,), (ROUND, ("correct-bias", {})))
    ]
    assert errors[1] < 0.8 * errors[0]


def test_what_has_hardly_moved_is_left_alone() -> None:
    program = one_linear()
    context = PassContext(calibration=Calibration([(shifted(32),)], program))
    passes = [make_pass(*ROUND), make_pass("correct-bias", {"smallest": 1e9})]
    step = Pipeline(passes).run(program, context).steps[-1]
    assert not step.changed
    assert "hardly moved" in step.skipped[0].reason


def test_a_layer_called_twice_is_skipped() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    program = capture(Twice().eval(), (shifted(2),), (BATCH,))
    result = run_with(program, [shifted(16)], ROUND, ("correct-bias", {}))
    assert "called several times" in result.steps[-1].skipped[0].reason


def test_data_is_needed() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("correct-bias", {})]).run(one_linear())
