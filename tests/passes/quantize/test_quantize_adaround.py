"""quantize-adaround, and what it shares with the other pass that trains blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.formats.int_blocks import IntBlocks
from mopt.layers import find_layers
from mopt.passes.quantize._blocks import find_blocks, input_moments, run_block
from mopt.passes.quantize.quantize_adaround import SoftRounding
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import batches_for, correlated, one_linear, run_with
from tests.tiny import Apply, normal, sample

SMALL = {"min_size": 0, "steps": 5}


def calibrated(name: str, source: object, changed: bool, options: dict[str, object],
               **more: object) -> Case:  # fmt: skip
    made = source() if callable(source) else source
    assert isinstance(made, Sample)
    program = made.capture()
    return Case(name, program, changed, SMALL | options,
                calibration=lambda: Calibration(batches_for(made), program), **more)  # fmt: skip


# The bounds are those of rounding to nearest in the same formats, which the choices may double.
CASES = [
    calibrated("int4", tiny.mlp(), True, {"group": 16}, tolerance=0.4),
    calibrated("decoder", tiny.decoder, True, {}, tolerance=0.5, skipped="not embeddings"),
    calibrated("layer-by-layer", tiny.mlp(), True, {"blocks": "layer", "symmetric": False},
               tolerance=0.4),
    calibrated("small-layers-stay", tiny.mlp(), False, {"min_size": 4096}, skipped="fewer than"),
    calibrated("convolutions-stay", tiny.conv_bn_relu(), False, {}, skipped="not convolutions"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["int4-g32", "int3-g16-asym", "int2-channel"])
def test_the_soft_weight_starts_as_the_weight_and_ends_beside_it(name: str) -> None:
    form = IntBlocks.parse(name)
    assert form is not None
    weight = normal(8, 40)
    grid = form.grid(weight, ranges="min-max")
    soft = SoftRounding(weight, form.decode(form.encode(weight, grid=grid)), form, grid, 0.1)
    scales = grid.scales.repeat_interleave(form.group_of(40), dim=1)[:, :40]
    zeros = torch.full_like(scales, 2.0 ** (form.bits - 1))
    if grid.zero_points is not None:
        zeros = grid.zero_points.repeat_interleave(form.group_of(40), dim=1)[:, :40]
    ratio = weight / scales + zeros
    inside = (ratio >= 0) & (ratio <= 2**form.bits - 1)
    assert float(inside.float().mean()) > 0.8
    assert torch.allclose(soft.weight()[inside], weight[inside], atol=2e-3)
    with torch.no_grad():
        soft.choice += 3 * normal(8, 40, seed=1)
    hard, _ = soft.final()
    moved = (hard / scales).round() - (weight / scales).floor()
    assert set(moved[inside].unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(form.decode(form.encode(hard, grid=grid)), hard)


def test_the_penalty_is_least_where_every_choice_is_made() -> None:
    form, weight = IntBlocks(4, 16), normal(4, 16)
    grid = form.grid(weight)
    soft = SoftRounding(weight, form.decode(form.encode(weight)), form, grid, 0.1)
    assert soft.penalty(0.1) is None
    with torch.no_grad():
        undecided = soft.penalty(0.9)
        soft.choice.copy_(soft.choice.sign() * 9)
        decided = soft.penalty(0.9)
    assert undecided is not None and decided is not None
    assert float(decided) == 0 < float(undecided)


@pytest.mark.parametrize(
    "blocks, start, left",
    [("module", "nearest", 0.85), ("layer", "nearest", 0.85), ("module", "gptq", 0.6)],
)
def test_the_output_comes_closer_than_with_rounding_to_nearest(
    blocks: str, start: str, left: float
) -> None:
    layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False))
    program = sample(layers, correlated(2, 64), dynamic=True).capture()
    data = [correlated(100, 64, seed=s) for s in range(4)]
    fresh = correlated(500, 64, seed=9)
    wanted = program.run(fresh)
    options = {"bits": 3, "activations": "float", "min_size": 0, "ranges": "mse"}
    nearest = run_with(program, data, ("quantize-weights", options))
    learnt = run_with(
        program, data,
        ("quantize-adaround", options | {"steps": 100, "blocks": blocks, "start": start}),
    )  # fmt: skip
    errors = [float((one.run(fresh) - wanted).square().mean()) for one in (nearest, learnt)]
    assert errors[1] < left * errors[0]
    assert all(0 < kept <= 1 for kept in learnt.steps[-1].stats["error_kept"].values())


def test_without_progress_the_nearest_codes_are_kept() -> None:
    program, data = one_linear(), [correlated(40, 64)]
    options = {"group": 32, "activations": "float", "min_size": 0, "ranges": "mse"}
    nearest = run_with(program, data, ("quantize-weights", options))
    wild = run_with(
        program,
        data,
        ("quantize-adaround", options | {"steps": 1, "rate": 0.0, "start": "nearest"}),
    )
    assert wild.weights()["weight_codes"].equal(nearest.weights()["weight_codes"])
    assert list(wild.steps[-1].stats["error_kept"].values()) == [1.0]


def test_a_block_runs_as_the_whole_model_does() -> None:
    program = tiny.decoder().capture()
    linears = [layer for layer in find_layers(program) if layer.kind == "linear"]
    blocks = find_blocks(program, linears, whole=True)
    assert [block.path for block in blocks] == ["blocks.0", "blocks.1", "head"]
    values: dict[object, Tensor] = {}
    program.interpret(lambda node, value: values.__setitem__(node, value), program.args)
    for block in blocks:
        found = run_block(program, block, values, {})
        assert len(found) == len(block.outputs) == 1
        assert torch.equal(found[0], values[block.outputs[0]])
    weights = {call: program.weight(x.weight) for x in blocks[0].layers for call in x.calls}
    moments = input_moments(program, blocks[0], [values], weights)
    read = values[blocks[0].layers[-1].calls[0].args[0]].flatten(0, -2)
    assert torch.allclose(moments[blocks[0].layers[-1]], read.t() @ read / len(read), atol=1e-5)


def test_blocks_that_overlap_are_one_and_inputs_are_not_written_to() -> None:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.first(torch.relu_(m.second(m.first(x))))

    made = sample(
        Apply(forward, first=nn.Linear(32, 32), second=nn.Linear(32, 32)),
        normal(3, 32),
        dynamic=True,
    )
    program = made.capture()
    blocks = find_blocks(program, find_layers(program), whole=False)
    assert len(blocks) == 1 and len(blocks[0].layers) == 2
    result = run_with(program, [normal(8, 32)], ("quantize-adaround", SMALL))
    assert result.plan["formats"].keys() == {"first", "second"}


def test_data_is_needed() -> None:
    with pytest.raises(PassError, match="needs calibration data") as missing:
        Pipeline([make_pass("quantize-adaround", SMALL)]).run(one_linear())
    assert missing.value.code == "pass-requires"


def test_other_codes_to_start_from_are_kept() -> None:
    form, weight = IntBlocks(4, 16), normal(4, 32)
    grid = form.grid(weight)
    other = form.quantize_columns(weight + 0.5 * grid.scales.abs().mean(), grid, 16, 0)
    found, _ = SoftRounding(weight, other, form, grid, 0.1).final()
    assert torch.equal(found, other)
