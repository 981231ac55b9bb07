"""quantize-gptq."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mopt.calibration import Calibration
from mopt.errors import InputError, LimitError, PassError
from mopt.formats.int_blocks import IntBlocks
from mopt.layers import find_layers
from mopt.lowering import lower
from mopt.pass_base import PassContext
from mopt.passes.quantize._calibrated import Moments, correction, grid_for
from mopt.passes.quantize._gptq import Inputs, round_with_feedback
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from mopt.second_order import output_error
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import batches_for, correlated, one_linear, run_with
from tests.tiny import Apply, normal, sample

SMALL = {"min_size": 0}


def calibrated(name: str, source: object, changed: bool, options: dict[str, object],
               **more: object) -> Case:  # fmt: skip
    made = source() if callable(source) else source
    assert isinstance(made, Sample)
    program = made.capture()
    return Case(name, program, changed, SMALL | options,
                calibration=lambda: Calibration(batches_for(made), program), **more)  # fmt: skip


def called_twice() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.layer(torch.relu(m.layer(x)))

    return sample(Apply(forward, layer=nn.Linear(32, 32)), normal(3, 32), dynamic=True)


# The same formats as round-to-nearest, whose bounds these are.
CASES = [
    calibrated("int4", tiny.mlp(), True, {"group": 16}, tolerance=0.25),
    calibrated("int4-asymmetric", tiny.mlp(), True, {"group": 16, "symmetric": False},
               tolerance=0.25),
    calibrated("int3-in-four-bits", tiny.linear(32, 8), True, {"bits": 3}, tolerance=0.5),
    calibrated("two-calls-share-codes", called_twice, True, {}, tolerance=0.25),
    calibrated("decoder", tiny.decoder, True, {}, tolerance=0.4, skipped="not embeddings"),
    calibrated("ragged-last-group", tiny.linear(40, 8), True, {"group": 16}, tolerance=0.25),
    calibrated("small-layers-stay", tiny.mlp(), False, {"min_size": 4096}, skipped="fewer than"),
    calibrated("mostly-padding", tiny.linear(20, 8), False, {"group": 64}, skipped="69% padding"),
    calibrated("convolutions-stay", tiny.conv_bn_relu(), False, {}, skipped="not convolutions"),
]  # fmt: skip


def moment_of(rows: Tensor) -> Tensor:
    return rows.t() @ rows / len(rows)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g16-asym", "int3-g32", "int8-channel"])
@pytest.mark.parametrize("ranges", ["mse", "output", "min-max"])
@pytest.mark.parametrize("by_activation", [True, False])
def test_white_inputs_give_round_to_nearest_bit_for_bit(
    name: str, ranges: str, by_activation: bool
) -> None:
    form = IntBlocks.parse(name)
    assert form is not None
    weight, identity = normal(8, 200), torch.eye(200)
    grid = grid_for(form, weight, identity, ranges)
    inputs = Inputs.of(identity, by_activation=by_activation)
    found = round_with_feedback(weight, inputs, form, grid, refinements=0)
    nearest = form.quantize_columns(weight, grid, form.group_of(200), 0)
    assert torch.equal(found.weight, nearest)


def test_squared_feedback_equals_the_error_of_the_output() -> None:
    form, weight = IntBlocks(4, 32), normal(16, 300)
    moment = moment_of(correlated(1000, 300))
    found = round_with_feedback(weight, Inputs.of(moment), form, form.grid(weight), refinements=0)
    damped = moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(300)
    assert found.error == pytest.approx(output_error(weight - found.weight, damped), rel=1e-4)
    assert found.feedback_error == pytest.approx(found.error, rel=1e-4)


def test_feedback_and_each_refinement_lower_the_error_on_correlated_inputs() -> None:
    form, weight = IntBlocks(3, 64), normal(32, 256)
    moment = moment_of(correlated(2000, 256))
    grid = form.grid(weight)
    nearest = output_error(weight - form.quantize_columns(weight, grid, 64, 0), moment)
    inputs = Inputs.of(moment)
    errors = [
        output_error(
            weight - round_with_feedback(weight, inputs, form, grid, refinements=n).weight, moment
        )
        for n in (0, 1, 4)
    ]
    assert errors[0] < 0.7 * nearest
    assert errors[2] < errors[1] < 0.95 * errors[0]


def test_what_is_returned_lies_on_its_grid() -> None:
    form, weight = IntBlocks(4, 16, asymmetric=True), normal(8, 80)
    inputs = Inputs.of(moment_of(correlated(99, 80)))
    found = round_with_feedback(weight, inputs, form, form.grid(weight))
    again = form.decode(form.encode(found.weight, grid=found.grid))
    assert torch.allclose(again, found.weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("refinements", [0, 2])
def test_dead_inputs_and_single_rows_stay_finite(refinements: int) -> None:
    form, weight = IntBlocks(4, 16), normal(8, 64)
    weight[:, :16] = 0
    row = correlated(1, 64)
    row[:, 20:40] = 0
    for moment in (moment_of(row), torch.zeros(64, 64)):
        grid = grid_for(form, weight, moment, "output")
        found = round_with_feedback(weight, Inputs.of(moment), form, grid, refinements=refinements)
        assert found.damping is not None
        assert bool(torch.isfinite(found.weight).all())
        assert torch.equal(found.weight[:, :16], weight[:, :16])
        assert float((found.weight - weight).square().mean()) < 0.05 * float(weight.var())


def test_damping_is_raised_and_then_given_up() -> None:
    form, weight = IntBlocks(4, 16), normal(4, 32)
    grid = form.grid(weight)
    # Symmetric matrices that no second moment can be: the smallest eigenvalue is negative.
    slightly = torch.eye(32) + 1.04 * torch.eye(32).flip(0)
    raised = round_with_feedback(weight, Inputs.of(slightly, damping=0.01), form, grid)
    assert raised.damping == pytest.approx(0.1)
    hopeless = Inputs.of(torch.eye(32) + 9 * torch.eye(32).flip(0))
    given_up = round_with_feedback(weight, hopeless, form, grid)
    assert given_up.damping is None
    assert torch.equal(given_up.weight, form.quantize_columns(weight, grid, 16, 0))


def test_the_output_is_closer_than_with_rounding_to_nearest() -> None:
    program = one_linear()
    data = [correlated(40, 64, seed=s) for s in range(3)]
    options = {"group": 32, "activations": "float", **SMALL}
    fresh = correlated(500, 64, seed=9)
    wanted = program.run(fresh)
    error = {}
    for name in ("quantize-weights", "quantize-gptq"):
        result = run_with(program, data, (name, options))
        error[name] = float((result.run(fresh) - wanted).square().mean())
    assert error["quantize-gptq"] < 0.7 * error["quantize-weights"]


def test_aiming_at_the_original_is_the_least_squares_solution() -> None:
    x, weight = correlated(400, 48), normal(8, 48)
    y = x + 0.1 * normal(400, 48, seed=3) @ normal(48, 48, seed=4) / 7
    moments = Moments(y.t() @ y / 400, (x - y).t() @ y / 400)
    shift = correction(moments, damping=0)
    assert shift is not None
    best = torch.linalg.lstsq(y.double(), (x @ weight.t()).double()).solution.t()
    assert torch.allclose((weight + weight @ shift).double(), best, rtol=1e-3, atol=1e-3)
    assert correction(Moments(moments.second)) is None
    none = correction(Moments(moments.second, torch.zeros(48, 48)))
    assert none is not None and float(none.abs().max()) == 0


def test_a_layer_makes_up_for_the_rounding_of_the_layer_before_it() -> None:
    layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False))
    program = sample(layers, correlated(2, 64), dynamic=True).capture()
    data = [correlated(200, 64, seed=s) for s in range(3)]
    fresh = correlated(500, 64, seed=9)
    wanted = program.run(fresh)
    error = {}
    for aim in ("layer", "original"):
        options = {"bits": 3, "activations": "float", "aim": aim, **SMALL}
        result = run_with(program, data, ("quantize-gptq", options))
        error[aim] = float((result.run(fresh) - wanted).square().mean())
    assert error["original"] < 0.95 * error["layer"]


def test_layers_are_calibrated_behind_rounded_layers() -> None:
    """The second layer sees what the rounded first one gives, so an odd weight there shows."""
    made = tiny.mlp(32, 32)
    program = made.capture()
    data = [normal(64, 32, seed=s) for s in range(2)]
    both = run_with(program, data, ("quantize-gptq", SMALL | {"bits": 2}))
    alone = run_with(program, data, ("quantize-gptq", SMALL | {"bits": 2, "layers": "2"}))
    assert both.plan["formats"].keys() == {"0", "2"}
    codes = [
        next(t for path, t in result.weights().items() if path.startswith("2.weight_codes"))
        for result in (both, alone)
    ]
    assert not torch.equal(*codes)


def test_statistics_say_what_was_held() -> None:
    made = tiny.decoder()
    program = made.capture()
    context = PassContext(calibration=Calibration(batches_for(made, 4), program))
    result = Pipeline([make_pass("quantize-gptq", SMALL)]).run(program, context)
    stats = result.steps[-1].stats
    assert stats["batches"] == 4
    assert stats["output_error"].keys() == stats["formats"].keys()
    assert all(0 < error < 0.1 for error in stats["output_error"].values())
    # Tokens 2 x 6 in four batches; at most the residual and q, k, v and a norm are alive at once,
    # and the moment, the drift and one matrix in float64 of the layer that is rounded.
    widest = max(layer.shape[1] for layer in find_layers(program) if layer.kind == "linear")
    assert 0 < stats["peak_activation_bytes"] < 4 * (2 * 6 * 4) * 6 * 64 + 16 * widest**2


def test_a_limit_on_memory_is_obeyed() -> None:
    program = one_linear()
    context = PassContext(
        calibration=Calibration([(correlated(64, 64),)], program), max_memory_bytes=1000
    )
    with pytest.raises(LimitError, match=r"more than the limit of 0\.0 MB") as caught:
        Pipeline([make_pass("quantize-gptq", SMALL)]).run(program, context)
    assert caught.value.code == "max-memory"


def test_data_is_needed_and_must_be_finite() -> None:
    program = one_linear()
    with pytest.raises(PassError, match="needs calibration data") as missing:
        Pipeline([make_pass("quantize-gptq", SMALL)]).run(program)
    assert missing.value.code == "pass-requires"
    with pytest.raises(InputError, match="NaN or infinity") as infinite:
        overflowing()
    assert infinite.value.code == "non-finite-activation"


def test_what_a_layer_needs_beside_activations_counts() -> None:
    program, batches = one_linear(), [(correlated(40, 64),)]
    matrices = 16 * 64**2  # moment and drift in float32, and one in float64
    for limit in (matrices + 40 * 64 * 8 + 4096, matrices):
        context = PassContext(calibration=Calibration(batches, program), max_memory_bytes=limit)
        one = make_pass("quantize-gptq", {"min_size": 0})
        if limit == matrices:
            with pytest.raises(LimitError, match=r"rounding .* activations and statistics"):
                one.run(program.copy(), context)
        else:
            stats = one.run(program.copy(), context).stats
            assert matrices < stats["peak_activation_bytes"] <= limit


def overflowing() -> Program:
    layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    made = sample(layers, normal(2, 32), dynamic=True, scale=100.0)
    return run_with(made.capture(), [torch.full((4, 32), 1e37)], ("quantize-gptq", SMALL))


@pytest.mark.parametrize("name", ["quantize-gptq", "quantize-adaround", "quantize-qat"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_user_is_told_at_once_what_only_makes_the_file_smaller(name: str, bits: int) -> None:
    quiet = make_pass(name, {"bits": bits, "activations": "int8"})
    assert quiet.notice("onnx") is None
    in_float = make_pass(name, {"bits": bits, "activations": "float"})
    notice = in_float.notice("onnx")
    assert in_float.notice("eager") is None
    assert (notice is None) == (bits == 4)  # for 4 bits there is a float kernel
    assert notice is None or "afloat has no kernel on this target" in notice


def test_widths_without_a_float_kernel_compute_what_the_reference_does() -> None:
    options = {"bits": 8, "group": 32, "activations": "float", "min_size": 0}
    rounded = run_with(one_linear(), [correlated(40, 64)], ("quantize-gptq", options))
    rows = correlated(9, 64, seed=3)
    with lower(rounded, "onnx").load(threads=1) as run:
        found = torch.as_tensor(run(rows))
    assert torch.allclose(found, rounded.run(rows), atol=1e-5)
