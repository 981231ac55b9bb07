"""quantize-hqq."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mopt.formats.grid import min_max_grid
from mopt.lowering import lower
from mopt.passes.quantize.quantize_hqq import fit_zero_points
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case
from tests.tiny import normal

SMALL = {"min_size": 0, "group": 16}
CASES = [
    Case("int4", tiny.mlp(), True, SMALL, tolerance=0.25),
    Case("int2", tiny.linear(32, 8), True, SMALL | {"bits": 2}, tolerance=1.0),
    Case("ragged", tiny.linear(40, 8), False, SMALL, skipped="not a multiple of group 16"),
    Case("small-layers-stay", tiny.mlp(), False, {"group": 16}, skipped="fewer than"),
    Case("convolutions-stay", tiny.conv_bn_relu(), False, SMALL, skipped="not convolutions"),
]


def restored(weight: Tensor, group: int, bits: int) -> Tensor:
    grid, offsets = fit_zero_points(weight, group, bits)
    assert grid.zero_points is not None
    x = weight.unflatten(1, (-1, group))
    scale, zero = grid.scales.unsqueeze(-1), grid.zero_points.unsqueeze(-1)
    codes = torch.round((x - offsets.unsqueeze(-1)) / scale) + zero
    codes = codes.clamp(0, 2**bits - 1)
    return ((codes - zero) * scale + offsets.unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_smaller_than_with_rounding_to_nearest(bits: int) -> None:
    heavy = normal(64, 256) / (normal(64, 256, seed=1).abs() + 0.2)
    x = heavy.unflatten(1, (-1, 64))
    grid = min_max_grid(x.amin(-1), x.amax(-1), bits, symmetric=False)
    assert grid.zero_points is not None
    scale, zero = grid.scales.unsqueeze(-1), grid.zero_points.unsqueeze(-1)
    nearest = ((torch.round(x / scale) + zero).clamp(0, 2**bits - 1) - zero) * scale
    found = (restored(heavy, 64, bits) - heavy).abs().mean()
    assert float(found) < float((nearest.flatten(1) - heavy).abs().mean())


def test_constant_and_zero_groups_are_exact() -> None:
    weight = torch.cat([torch.zeros(2, 32), torch.full((2, 32), -3.5), torch.full((2, 32), 1e-20)])
    assert torch.allclose(restored(weight, 16, 4), weight, rtol=1e-5, atol=0)


def test_onnx_computes_what_the_reference_does() -> None:
    made = tiny.linear(64, 24)
    options = SMALL | {"activations": "float"}
    result = Pipeline([make_pass("quantize-hqq", options)]).run(made.capture())
    x = normal(*made.inputs[0].shape, seed=3)
    wanted = result.run(x)
    with lower(result, "onnx").load(threads=1) as run:
        found = torch.as_tensor(run(x))
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_a_user_is_told_at_once_what_only_makes_the_file_smaller() -> None:
    notice = make_pass("quantize-hqq", {"bits": 2, "activations": "float"}).notice("onnx")
    assert notice is not None and "int2-g64-asym-afloat has no kernel" in notice
    assert make_pass("quantize-hqq", {"bits": 2}).notice("onnx") is None
