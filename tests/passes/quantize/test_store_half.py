"""store-half."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mopt.pipeline import Pipeline
from mopt.program import iter_calls
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.test_quantize_embeddings import tied
from tests.tiny import Apply, normal, sample


def scaled(factor: float) -> Sample:
    made = sample(nn.Linear(16, 8), normal(2, 16))
    with torch.no_grad():
        made.module.weight.mul_(factor)
    return made


def too_large_for_either() -> Sample:
    made = sample(nn.Linear(16, 8), normal(2, 16, scale=1e-30))
    with torch.no_grad():
        made.module.weight[0, 0] = 3.4e38
    return made


def matrix_product() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return x @ m.table + m.table.sum(0)

    return sample(Apply(forward, table=nn.Parameter(torch.ones(16, 8))), normal(2, 16))


def already_half() -> Sample:
    made = sample(nn.Linear(16, 8), normal(2, 16))
    return Sample(made.module.half(), (made.inputs[0].half(),))


SMALL = {"min_size": 16}
# float16 keeps 11 bits, bfloat16 8, of each weight; sums of 16 to 64 products average that out.
CASES = [
    Case("mlp", tiny.mlp(), True, SMALL, tolerance=1e-3),
    Case("bfloat16", tiny.mlp(), True, SMALL | {"dtype": "bf16"}, tolerance=8e-3),
    Case("small-cnn", tiny.small_cnn(), True, SMALL, tolerance=1e-3),
    Case("tied-table", tied, True, SMALL, tolerance=1e-3),
    Case("embeddings-only", tiny.decoder, True, SMALL | {"kinds": "embeddings"}, tolerance=1e-3),
    Case("no-embeddings", tiny.mlp(), False, SMALL | {"kinds": "embeddings"}),
    Case("any-reader", matrix_product, True, SMALL, tolerance=1e-3),
    Case("too-large-becomes-bfloat16", scaled(1e6), True, SMALL, tolerance=8e-3),
    Case("too-small-becomes-bfloat16", scaled(1e-8), True, SMALL, tolerance=8e-3),
    Case("decoder", tiny.decoder, True, SMALL, tolerance=3e-3),
    Case("too-large-for-either", too_large_for_either, False, SMALL,
         skipped="its largest value 3.4e+38 exceeds 65504"),
    Case("small-weights-stay", tiny.mlp(), False),
    Case("already-half", already_half, False, SMALL,
         skipped="the weight is float16, only float32 becomes smaller in 16 bits"),
]  # fmt: skip


def test_halves_the_size() -> None:
    program = tiny.mlp(64, 128).capture()
    result = Pipeline([make_pass("store-half", {})]).run(program)
    vectors = (64 + 128) * 4
    assert result.size_bytes() - vectors == (program.size_bytes() - vectors) / 2


def test_values_beyond_float16_are_kept() -> None:
    result = Pipeline([make_pass("store-half", SMALL)]).run(scaled(1e6).capture())
    assert result.steps[-1].stats["formats"] == {"": "bf16"} or set(
        result.steps[-1].stats["formats"].values()
    ) == {"bf16"}
    assert all(bool(torch.isfinite(t).all()) for t in result.weights().values())


def test_only_the_rows_in_use_of_a_table_are_widened() -> None:
    result = Pipeline([make_pass("store-half", SMALL)]).run(tied().capture())
    (look_up,) = iter_calls(result, torch.ops.aten.embedding.default)
    assert look_up.meta["val"].dtype == torch.float16


def test_codes_and_scales_of_other_formats_are_left_alone() -> None:
    program = tiny.mlp(64, 128).capture()
    passes = [make_pass("quantize-dynamic", {}), make_pass("store-half", SMALL)]
    result = Pipeline(passes).run(program)
    codes = [t.dtype for t in result.weights().values() if t.dim() == 2]
    assert codes == [torch.int8, torch.int8]
    assert not result.steps[-1].changed
