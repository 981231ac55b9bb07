"""quantize-levels."""

from __future__ import annotations

import pytest
import torch

from mopt.formats import find_format
from mopt.lowering import lower
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case
from tests.tiny import normal

CASES = [
    Case("nf4", tiny.mlp(64, 64), True, {"min_size": 0}, tolerance=0.3),
    Case("nvfp4", tiny.mlp(), True, {"min_size": 0, "format": "nvfp4"}, tolerance=0.3),
    Case("bitmod3-is-int4", tiny.linear(128, 8), True, {"min_size": 0, "format": "bitmod3"},
         tolerance=0.5),
    Case("fp8", tiny.mlp(), True, {"min_size": 0, "format": "fp8-e4m3"}, tolerance=0.1),
    Case("twin-log", tiny.linear(128, 8), True, {"min_size": 0, "format": "twinlog4"},
         tolerance=0.3),
    Case("small-layers-stay", tiny.mlp(), False, skipped="fewer than"),
    Case("mostly-padding", tiny.linear(20, 8), False, {"min_size": 0}, skipped="69% padding"),
    Case("convolutions-stay", tiny.conv_bn_relu(), False, {"min_size": 0}, skipped="not conv"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["nf4", "mxfp4", "nvfp4", "bitmod4", "bitmod3", "fp8-e5m2", "twinlog4"]
)
def test_onnx_computes_what_the_reference_does_in_a_smaller_file(name: str) -> None:
    made = tiny.linear(200, 96)
    program = made.capture()
    options = {"min_size": 0, "format": name}
    result = Pipeline([make_pass("quantize-levels", options)]).run(program)
    artifact, plain = lower(result, "onnx"), lower(program, "onnx")
    codes = find_format(name).size_bytes((96, 200))
    assert artifact.size_bytes - plain.size_bytes < codes - 4 * 96 * 200 + 6000
    x = normal(*made.inputs[0].shape, seed=3)
    with artifact.load(threads=1) as run:
        found = torch.as_tensor(run(x))
    # bitmod3 has a kernel that rounds the input to 8 bits, as its reference does.
    bound = 2e-2 if name == "bitmod3" else 1e-5
    wanted = result.run(x)
    assert float((found - wanted).abs().max()) < bound * float(wanted.abs().max())


def test_a_user_is_told_at_once_what_a_format_without_kernel_gives() -> None:
    assert "no kernel" in str(make_pass("quantize-levels", {}).notice("onnx"))
    assert make_pass("quantize-levels", {"format": "bitmod3"}).notice("onnx") is None
    assert make_pass("quantize-levels", {}).notice("eager") is None


def test_each_layer_gets_the_format_that_suits_it() -> None:
    made, at = tiny.mlp(128, 128), torch.arange(128)
    with torch.no_grad():
        logarithmic = torch.where(at % 3 == 0, -1.0, 1.0) * 2 ** (-0.45 * (at % 8))
        made.module[0].weight.copy_(logarithmic)
    options = {"min_size": 0, "format": "twinlog4", "otherwise": "nf4-g128"}
    result = Pipeline([make_pass("quantize-levels", options)]).run(made.capture())
    assert result.plan["formats"] == {"0": "twinlog4", "2": "nf4-g128"}
