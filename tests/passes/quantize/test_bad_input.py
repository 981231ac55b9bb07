"""Input that breaks quantizers: every pass of the family gives an error or a sound result."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from mopt.errors import LoweringError, MoptError, PassError
from mopt.formats.base import broken_scales
from mopt.frontend import capture
from mopt.lowering import lower
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import find_pass, list_passes, make_pass
from tests.passes.quantize.calibrated import run_with
from tests.tiny import normal

PASSES = sorted(name for name, one in list_passes().items() if one.family == "quantize")
WIDTH = 40  # no multiple of 16, 32, 64 or 128
# Small enough to test with, and so that something happens.
OPTIONS = {"min_size": 0, "steps": 2, "group": 16, "block": 16, "keep": 1.0, "ranges": "output"}


def options(name: str) -> dict[str, object]:
    known = find_pass(name).__dataclass_fields__
    found = {}
    for key, value in OPTIONS.items():
        choices = known[key].metadata["choices"] if key in known else ()
        if key in known and (choices is None or value in choices):
            found[key] = value
    return found


@cache
def program(broken: str = "") -> Program:
    """Norm, linear, relu, linear, linear, captured while all weights are sound."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, 64), nn.Linear(64, 8)
    )
    captured = capture(module.eval(), (normal(4, WIDTH),), ({0: torch.export.Dim("b", max=99)},))
    weight = dict(captured.graph_module.named_parameters())["1.weight"]
    with torch.no_grad():
        if broken == "zeros":
            for each in captured.graph_module.parameters():
                if each.dim() == 2:
                    each[:, :32] = 0
                    each[0] = 0
        elif broken:
            weight[3, 5] = float(broken)
    return captured


def check_sound(result: Program) -> None:
    assert not broken_scales(result)
    assert all(bool(t.float().isfinite().all()) for t in result.weights().values())
    assert bool(result.run(normal(5, WIDTH, seed=9)).isfinite().all())


RAGGED = [normal(rows, WIDTH, seed=rows) for rows in (1, 7, 3)]
ONE_SAMPLE = [normal(1, WIDTH)]
CONSTANT = [torch.full((6, WIDTH), 3.0), torch.zeros(2, WIDTH)]


@pytest.mark.parametrize("name", PASSES)
def test_poor_data_and_groups_of_zeros_give_a_sound_result(name: str) -> None:
    check_sound(run_with(program(), CONSTANT, (name, options(name))))
    check_sound(run_with(program("zeros"), ONE_SAMPLE, (name, options(name))))


@pytest.mark.parametrize("name", [one for one in PASSES if "group" in options(one)])
def test_groups_that_do_not_divide_are_padded_or_left_out_with_a_reason(name: str) -> None:
    result = run_with(program(), RAGGED, (name, options(name) | {"group": 64}))
    check_sound(result)
    formats = result.plan.get("formats", {})
    for skip in result.steps[-1].skipped:
        assert skip.site not in formats
        assert "padding" in skip.reason or "multiple" in skip.reason or "group" not in skip.reason


@pytest.mark.parametrize("name", PASSES)
def test_a_weight_that_is_not_finite_is_an_error_or_left_alone(name: str) -> None:
    try:
        result = run_with(program("nan"), RAGGED, (name, options(name)))
    except MoptError as error:
        assert "NaN or inf" in str(error)
        return
    assert not result.steps[-1].changed


@pytest.mark.parametrize("name", PASSES)
def test_missing_data_is_an_error_that_says_so(name: str) -> None:
    needed = make_pass(name, options(name)).requires(program(), PassContext())
    if needed is None:
        return
    with pytest.raises(PassError, match="needs calibration data") as caught:
        Pipeline([make_pass(name, options(name))]).run(program())
    assert caught.value.code == "pass-requires"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_writer_refuses_scales_that_are_not_finite(value: float) -> None:
    rounding = make_pass("quantize-weights", {"group": 16, "min_size": 0})
    result = Pipeline([rounding]).run(program())
    scales = next(t for path, t in result.weights().items() if path.endswith("_scales"))
    scales[0, 0] = value
    with pytest.raises(LoweringError, match="hold NaN or infinity") as caught:
        lower(result, "onnx")
    assert caught.value.code == "non-finite-scale"
