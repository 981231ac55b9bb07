"""quantize-dynamic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.tiny import Apply, normal, sample


def all_zero_weight() -> Sample:
    made = sample(nn.Linear(16, 8), normal(2, 16))
    with torch.no_grad():
        made.module.weight.zero_()
    return made


def half_precision() -> Sample:
    made = sample(nn.Linear(16, 8), normal(2, 16))
    return Sample(made.module.to(torch.bfloat16), (made.inputs[0].bfloat16(),))


def computed_weight() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return nn.functional.linear(x, m.table.tanh())

    return sample(Apply(forward, table=nn.Parameter(torch.ones(8, 16))), normal(2, 16))


SMALL = {"min_size": 0}
# Weights and activations each carry rounding of about 1/250 of their range: 1 % of the output at
# most layers, a little more for the largest of many.
CASES = [
    Case("mlp", tiny.mlp(), True, SMALL, tolerance=0.03),
    Case("mlp-reduced", tiny.mlp(), True, SMALL | {"reduce_range": True}, tolerance=0.05),
    Case("min-max", tiny.mlp(), True, SMALL | {"ranges": "min-max"}, tolerance=0.03),
    Case("decoder", tiny.decoder, True, SMALL, tolerance=0.06),
    Case("cnn-head-only", tiny.small_cnn(), True, SMALL, tolerance=0.03,
         skipped="no fast kernel with run-time ranges; calibrate instead"),
    Case("all-zero-weight", all_zero_weight, True, SMALL, tolerance=1e-6),
    Case("small-layers-stay", tiny.mlp(), False, skipped="fewer than min_size 4096"),
    Case("bfloat16-stays", half_precision, False, SMALL,
         skipped="the weight is bfloat16, int8-dynamic computes in float32: call model.float()"),
    Case("computed-weight-stays", computed_weight, False, SMALL),
    Case("excluded-by-name", tiny.mlp(), False, SMALL | {"layers": "9"}),
]  # fmt: skip


def test_reduced_codes() -> None:
    program = tiny.mlp(64, 128).capture()
    result = Pipeline([make_pass("quantize-dynamic", {"reduce_range": True})]).run(program)
    codes = [t for t in result.weights().values() if t.dtype == torch.int8]
    assert len(codes) == 2
    assert all(int(t.abs().max()) <= 64 for t in codes)
    assert set(result.steps[-1].stats["formats"].values()) == {"int8-dynamic-reduced"}
