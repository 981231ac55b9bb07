"""store-int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

import mopt
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case
from tests.passes.quantize.test_quantize_embeddings import tied
from tests.tiny import normal, sample

SMALL = {"min_size": 16}
# 8 bits with a scale per channel: an error of 1/254 of the largest weight at most.
CASES = [
    Case("mlp", tiny.mlp(), True, SMALL, tolerance=0.02),
    Case("small-cnn", tiny.small_cnn(), True, SMALL, tolerance=0.02),
    Case("groups", tiny.conv_bn_relu(groups=2), True, SMALL, tolerance=0.02),
    Case("only-convolutions", tiny.small_cnn(), True, SMALL | {"kinds": "convolutions"},
         tolerance=0.02),
    Case("no-convolutions", tiny.mlp(), False, SMALL | {"kinds": "convolutions"}),
    Case("small-weights-stay", tiny.mlp(), False, skipped="fewer than min_size"),
    Case("tied-table", tied, True, SMALL, tolerance=0.02, skipped="its weight is also a table"),
    Case("left-out", tiny.mlp(), False, SMALL | {"skip": "*"}),
]  # fmt: skip


@pytest.mark.parametrize(
    "module",
    [nn.Conv1d(6, 8, 3), nn.Conv2d(6, 8, 3, groups=2), nn.ConvTranspose2d(6, 8, 2, stride=2)],
    ids=["line", "groups", "transposed"],
)
def test_a_stored_convolution_runs_as_fast_as_a_float_one(
    module: nn.Module, tmp_path: Path
) -> None:
    """The file holds codes; what ONNX Runtime executes is a float convolution and nothing else."""
    x = normal(2, 6, *([9] * (1 if isinstance(module, nn.Conv1d) else 2)))
    program = sample(module, x).capture()
    stored = Pipeline([make_pass("store-int8", SMALL)]).run(program)
    assert stored.size_bytes() < 0.5 * program.size_bytes()
    mopt.lower(stored, backend="onnx").save(tmp_path / "out")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(tmp_path / "out" / "model.onnx", options)
    kernels = {node.op_type for node in _nodes(tmp_path / "optimized.onnx")}
    assert kernels <= {"Conv", "ConvTranspose", "ReorderOutput", "ReorderInput"}
    found = np.asarray(mopt.load(tmp_path / "out")(x))
    np.testing.assert_allclose(found, stored.run(x).numpy(), rtol=1e-4, atol=1e-5)


def test_codes_are_nearest() -> None:
    torch.manual_seed(0)
    program = sample(nn.Conv2d(4, 8, 3), normal(1, 4, 6, 6)).capture()
    options = SMALL | {"ranges": "min-max"}
    stored = Pipeline([make_pass("store-int8", options)]).run(program)
    (before,) = [w for w in program.weights().values() if w.dim() == 4]
    weights = {tuple(w.shape): w for w in stored.weights().values()}
    codes = weights[(8, 4, 3, 3)]
    scales = before.flatten(1).abs().amax(1) / 127
    assert codes.dtype == torch.int8
    wrong = codes.float() * scales[:, None, None, None] - before
    assert bool((wrong.flatten(1).abs().amax(1) <= 0.5001 * scales).all())


def _nodes(path: Path) -> list[object]:
    import onnx

    return list(onnx.load(path).graph.node)
