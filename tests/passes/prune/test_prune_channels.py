"""prune-channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mopt
from mopt.calibration import Calibration
from mopt.cost import cost_model
from mopt.coupling import find_coupling
from mopt.device import find_device
from mopt.errors import PassError, UsageError
from mopt.frontend import capture
from mopt.models import load
from mopt.pass_base import PassContext
from mopt.passes.prune._speed import LayerTimes
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.recipe import Recipe
from mopt.refit import refit
from mopt.registry import make_pass
from mopt.unit_scores import (
    collect_moments,
    gradient_scores,
    magnitude_scores,
    output_scores,
    width_losses,
)
from tests import tiny
from tests.case import Case, Sample, outputs
from tests.passes.prune.costs import BlockModel
from tests.passes.quantize.calibrated import batches_for
from tests.tiny import Apply, normal, sample

ANY = {"multiple": 1, "ratio": 0.25}
TABLE = {"cost_model": BlockModel(1)}


def case(name: str, source: Any, changed: bool, options: dict[str, Any], **more: Any) -> Case:
    return Case(name, source, changed, ANY | options, **{"context": TABLE, **more})


def calibrated(name: str, made: Sample, options: dict[str, Any], **more: Any) -> Case:
    program = made.capture()
    data = Calibration(batches_for(made), program)
    return case(name, program, True, options, calibration=lambda: data, **more)


def unknown_operator() -> Sample:
    parts = {"up": nn.Linear(8, 16), "out": nn.Linear(16, 4)}
    return sample(Apply(lambda m, x: m.out(torch.fft.fft(m.up(x)).real), **parts), normal(3, 8))


# A quarter of the FLOPs of tiny random layers: what is lost is of the size of what they compute.
CASES = [
    case("mlp", tiny.mlp(), True, {}, tolerance=0.9),
    case("residual", tiny.small_cnn(), True, {}, tolerance=2.0),
    case("grouped-queries", tiny.decoder, True, {"ratio": 0.2}, tolerance=0.9),
    calibrated("fitted", tiny.mlp(), {}, tolerance=0.6),
    calibrated("taylor", tiny.mlp(), {"importance": "taylor"}, tolerance=0.6),
    case("multiple", tiny.mlp(16, 36), True, {"multiple": 8}, tolerance=0.9),
    case("nothing-asked", tiny.mlp(), False, {"ratio": 0.0}),
    case("one-layer", tiny.linear(), False, {}, skipped="the model returns it"),
    case("not-tracked", unknown_operator, False, {}, skipped="kept whole: aten.fft_fft"),
    case("too-narrow", tiny.mlp(16, 8), False, {"multiple": 8}, skipped="cannot shrink to"),
    case("left-out", tiny.mlp(), False, {"skip": "0"}),
    case("no-faster", tiny.mlp(), False, {"multiple": 1, "ratio": 0.1},
         context={"cost_model": BlockModel(32)}, skipped="not estimated to be faster"),
    case("little-gain", tiny.mlp(), False, {"ratio": 0.05, "least_gain": 0.5},
         skipped="less than 50 %"),
]  # fmt: skip


def prune(program: Program, options: dict[str, Any], **context: Any) -> Program:
    ctx = PassContext(**{"cost_model": BlockModel(1), **context})
    return Pipeline([make_pass("prune-channels", options)]).run(program, ctx)


@pytest.mark.parametrize("aim", ["flops", "parameters", "channels"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_what_is_asked_is_removed(aim: str, scope: str) -> None:
    program = tiny.small_cnn(32).capture()
    result = prune(program, {"ratio": 0.4, "aim": aim, "scope": scope, "multiple": 1})
    stats = result.steps[-1].stats
    shares = {
        "flops": 1 - result.flops() / program.flops(),
        "parameters": 1 - result.parameter_count() / program.parameter_count(),
        "channels": stats["removed_units"] / 96,
    }
    assert 0.39 <= shares[aim] <= 0.46
    assert stats["removed_flops"] == pytest.approx(shares["flops"], abs=1e-6)
    assert stats["removed_parameters"] == pytest.approx(shares["parameters"], abs=1e-6)


def test_widths_are_multiples_that_the_device_computes_as_one_block() -> None:
    result = prune(tiny.small_cnn(64).capture(), {"ratio": 0.3}, cost_model=BlockModel(16))
    widths = result.steps[-1].stats["widths"]
    assert widths and all(after % 16 == 0 for _, after in widths.values())


def test_five_percent_of_resnet50s_channels_would_not_be_faster_and_is_not_made() -> None:
    """At widths no multiple of a block, kernels compute as much as before."""
    program = capture(load("resnet50").build(), (torch.zeros(1, 3, 32, 32),))
    options = {"ratio": 0.05, "aim": "channels", "multiple": 1}
    result = prune(program, options, cost_model=BlockModel(16))
    assert not result.steps[-1].changed
    reasons = {skip.reason for skip in result.steps[-1].skipped}
    assert "a smaller width is not estimated to be faster" in reasons
    forced = prune(program, options | {"allow_slower": True}, cost_model=BlockModel(16))
    assert forced.steps[-1].changed


def test_a_compile_asks_the_cost_model_of_its_target() -> None:
    made, steps = tiny.mlp(64, 256), []
    mopt.compile(
        made.module, made.inputs, recipe="prune-channels", target="cpu-cortex-a76",
        backend="eager", callbacks=[steps.append],
    )  # fmt: skip
    assert steps[-1].changed
    coupling = find_coupling(made.capture())
    nothing = np.zeros(coupling.unit_count, dtype=bool)
    target, other = (
        LayerTimes(coupling, cost_model(find_device(name))).total(nothing)
        for name in ("cpu-cortex-a76", "cpu-avx2")
    )
    assert steps[-1].stats["estimated_layer_ms"]["before"] == pytest.approx(target)
    assert target > 1.2 * other


def test_a_ratio_that_empties_a_layer_and_one_outside_zero_to_one() -> None:
    program = tiny.mlp().capture()
    with pytest.raises(UsageError, match="ratio 1 would empty layers") as caught:
        prune(program, {"ratio": 1.0, "multiple": 1})
    assert caught.value.code == "empties-layer" and "lower ratio" in str(caught.value)
    with pytest.raises(UsageError, match=r"would empty layers: at most 0\.\d+ of the flops"):
        prune(program, {"ratio": 0.97, "multiple": 16})
    with pytest.raises(UsageError, match=r"allow at most 0\.\d+ of the flops to go") as caught:
        prune(program, {"ratio": 0.8, "multiple": 16})
    assert caught.value.code == "widths-too-coarse"
    assert "multiple=1: any width, 0.875" in str(caught.value)
    for wrong, wanted in ((-0.1, "least 0"), (1.5, "most 1"), (float("nan"), "a finite number"),
                          ("abc", "float")):  # fmt: skip
        with pytest.raises(UsageError, match=f"option ratio is .*, expected .*{wanted}"):
            make_pass("prune-channels", {"ratio": wrong})
    nothing = prune(program, {"ratio": 0}).steps[-1]
    assert not nothing.changed
    assert [skip.reason for skip in nothing.skipped if not skip.site] == [
        "a ratio of 0 removes nothing"
    ]
    with pytest.raises(PassError, match="needs calibration data"):
        prune(program, {"importance": "activation"})


def rows(program: Program, made: Sample, count: int = 6) -> Calibration:
    return Calibration(batches_for(made, count), program)


def test_duplicated_units_have_equal_scores_and_units_that_do_nothing_have_none() -> None:
    made = tiny.mlp(8, 16)
    with torch.no_grad():
        for tensor in (made.module[0].weight, made.module[0].bias):
            tensor[3] = tensor[5]
        made.module[2].weight[:, 3] = made.module[2].weight[:, 5]
        made.module[2].weight[:, 7] = 0
    program = made.capture()
    found = find_coupling(program)
    moments = collect_moments(program, found, PassContext(calibration=rows(program, made)))
    every = [
        magnitude_scores(program, found),
        output_scores(program, found, moments, reconstruct=False),
        output_scores(program, found, moments, reconstruct=True),
    ]
    for scores in every:
        assert scores[3] == pytest.approx(scores[5])
        assert (scores >= 0).all() and torch.isfinite(torch.from_numpy(scores)).all()
    for scores in every[1:]:
        assert scores[7] == 0
    # A copy can be made up for, which only the score that reconstructs knows.
    assert every[2][3] < 0.2 * every[1][3]


def test_activation_scores_are_the_output_power_of_the_units() -> None:
    made = tiny.mlp(8, 16)
    program = made.capture()
    found, data = find_coupling(program), rows(program, made)
    moments = collect_moments(program, found, PassContext(calibration=data))
    scores = output_scores(program, found, moments, reconstruct=False)
    hidden = torch.cat([made.module[1](made.module[0](batch)) for (batch,), _ in data]).double()
    hidden, weight = hidden.detach(), made.module[2].weight.detach().double()
    power = (hidden @ weight.t()).square().sum()
    expected = [float(torch.outer(hidden[:, i], weight[:, i]).square().sum() / power)
                for i in range(16)]  # fmt: skip
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)


def test_gradient_scores_are_those_of_a_factor_on_each_unit_and_ignore_scale() -> None:
    made = tiny.mlp(8, 16)
    program = made.capture()
    found, data = find_coupling(program), rows(program, made, 3)
    context = PassContext(calibration=data)
    taylor = gradient_scores(program, found, context, squared_first=False)
    assert (taylor > 0).all()
    assert (gradient_scores(program, found, context, squared_first=True) > 0).all()
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plain = sample(layers, normal(4, 8), dynamic=True)
    scores = []
    for scale in (1.0, 4.0):
        with torch.no_grad():
            layers[0].weight[2] *= scale
            layers[0].bias[2] *= scale
            layers[2].weight[:, 2] /= scale
        program = plain.capture()
        found = find_coupling(program)
        context = PassContext(calibration=rows(program, plain, 3))
        scores.append(gradient_scores(program, found, context, squared_first=False))
    assert scores[0].tolist() == pytest.approx(scores[1].tolist(), rel=1e-4)


def test_losses_by_width_add_up_from_the_least_important_on() -> None:
    program = tiny.mlp(8, 16).capture()
    found = find_coupling(program)
    scores = magnitude_scores(program, found)
    losses = width_losses(found.groups[0], scores)
    assert len(losses) == 17 and losses[0] == 0
    assert losses[-1] == pytest.approx(scores.sum())
    assert losses[1] == pytest.approx(scores.min())


def drift(made: Sample, program: Program, result: Program) -> float:
    total = 0.0
    for (batch,), _ in rows(program, made):
        total += float((outputs(program, (batch,), {})[0] - outputs(result, (batch,), {})[0])
                       .square().sum())  # fmt: skip
    return total


def test_fitting_and_scores_from_data_lower_the_error_on_that_data() -> None:
    made = tiny.small_cnn(16)
    program = made.capture()
    options = {"ratio": 0.4, "multiple": 1, "importance": "reconstruction"}
    data = rows(program, made)
    plain = prune(program, options | {"refit": False}, calibration=data)
    fitted = prune(program, options, calibration=data)
    assert drift(made, program, fitted) < 0.5 * drift(made, program, plain)
    errors = fitted.steps[-1].stats["refit"]["output_error"]
    assert errors and all(after < before for before, after in errors.values())


def test_a_unit_that_others_can_replace_is_lost_without_a_trace() -> None:
    made = tiny.mlp(8, 16)
    with torch.no_grad():
        made.module[0].weight[3] = made.module[0].weight[5]
        made.module[0].bias[3] = made.module[0].bias[5]
    program = made.capture()
    options = {"ratio": 0.06, "aim": "channels", "multiple": 1, "importance": "reconstruction"}
    result = prune(program, options, calibration=rows(program, made, 60))
    assert result.steps[-1].stats["removed_units"] == 1
    assert drift(made, program, result) < 1e-3 * drift(made, program, prune(program, options | {
        "refit": False}, calibration=rows(program, made, 60)))  # fmt: skip


def test_fitting_an_unchanged_program_leaves_it_alone() -> None:
    made = tiny.mlp(8, 16)
    program = made.capture()
    copy = program.copy()
    said = refit(copy, program, {}, PassContext(calibration=rows(program, made)))
    assert said == {"layers": 0}
    assert copy.fingerprint() == program.fingerprint()


def test_channels_kept_are_noted_for_later_passes_relative_to_the_original() -> None:
    program = tiny.mlp(8, 16).capture()
    once = prune(program, {"ratio": 0.5, "aim": "channels", "multiple": 1})
    twice = prune(once, {"ratio": 0.5, "aim": "channels", "multiple": 1})
    (first,) = once.plan["kept_channels"].values()
    (second,) = twice.plan["kept_channels"].values()
    assert len(first) == 8 and len(second) == 4 and set(second) < set(first)
    original, left = (p.weight(next(n for n in p.graph.nodes if "0.weight" in str(n.target)))
                      for p in (program, twice))  # fmt: skip
    assert torch.equal(original[second], left)


def test_preset_keeps_the_digits_cnn_within_a_point_at_half_the_flops() -> None:
    zoo = load("digits-cnn")
    program = capture(zoo.build(), zoo.example_inputs(), zoo.dynamic_shapes())
    recipe = Recipe.load("prune-channels").with_settings(["prune_channels.ratio=0.5"])
    ctx = PassContext(calibration=Calibration(list(zoo.calibration()), program))
    result = Pipeline(recipe.passes()).run(program, ctx)
    assert result.flops() <= 0.5 * program.flops()
    assert zoo.evaluate(result.run)["value"] > zoo.evaluate(program.run)["value"] - 0.01
