"""quantize-weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mopt.errors import InputError, UsageError
from mopt.frontend import capture
from mopt.lowering import lower
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.tiny import Apply, normal, sample


def two_calls_of_one_layer() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.layer(torch.relu(m.layer(x)))

    return sample(Apply(forward, layer=nn.Linear(32, 32)), normal(3, 32), dynamic=True)


def double_precision() -> Sample:
    made = sample(nn.Linear(32, 8), normal(2, 32))
    return Sample(made.module.double(), (made.inputs[0].double(),))


SMALL = {"min_size": 0}
# The squared error of random weights is 0.7 % at 4 bits in groups of 32, 0.003 % at 8 bits: 8 % and
# 0.5 % of an output's size, times about 3 for the largest of a few dozen outputs.
CASES = [
    Case("int4", tiny.mlp(), True, SMALL | {"group": 16}, tolerance=0.25),
    Case("int4-asymmetric", tiny.mlp(), True, SMALL | {"group": 16, "symmetric": False},
         tolerance=0.25),
    Case("int8-per-channel", tiny.mlp(), True, SMALL | {"bits": 8, "group": 0}, tolerance=0.04),
    Case("int2", tiny.linear(32, 8), True, SMALL | {"bits": 2}, tolerance=0.8),
    Case("float-activations", tiny.linear(32, 8), True, SMALL | {"activations": "float"},
         tolerance=0.2),
    Case("no-bias", tiny.linear(32, 8, bias=False), True, SMALL, tolerance=0.25),
    Case("two-calls-share-codes", two_calls_of_one_layer, True, SMALL, tolerance=0.25),
    Case("ragged-last-group", tiny.linear(40, 8), True, SMALL | {"group": 16}, tolerance=0.25),
    Case("decoder", tiny.decoder, True, SMALL, tolerance=0.4, skipped="not embeddings"),
    Case("small-layers-stay", tiny.mlp(), False, skipped="fewer than min_size 4096"),
    Case("mostly-padding", tiny.linear(20, 8), False, SMALL | {"group": 64},
         skipped="in_features 20 in groups of 64 would store 69% padding; leave the layer out"),
    Case("group-that-fits", tiny.linear(48, 8), False, SMALL | {"group": 128},
         skipped="in_features 48 in groups of 128 would store 62% padding; group=16 fits"),
    Case("float64-stays", double_precision, False, SMALL, skipped="call model.float()"),
    Case("convolutions-stay", tiny.conv_bn_relu(), False, SMALL, skipped="not convolutions"),
    Case("excluded-by-name", tiny.mlp(), False, SMALL | {"skip": "0,2"}),
]  # fmt: skip


def quantized(program: Program, **options: object) -> Program:
    return Pipeline([make_pass("quantize-weights", SMALL | options)]).run(program)


def test_size_and_statistics() -> None:
    program = capture(nn.Linear(128, 64).eval(), (normal(2, 128),))
    result = quantized(program)
    assert result.size_bytes() == 64 * 128 // 2 + 64 * 4 * 4 + 64 * 4
    stats = result.steps[-1].stats
    assert stats["formats"] == {"": "int4-g32"} or stats["formats"] == {"weight": "int4-g32"}
    assert 0 < next(iter(stats["weight_error"].values())) < 0.01
    assert result.plan["formats"] == stats["formats"]


def test_heads_keep_more_bits() -> None:
    """The layer whose value is returned, through a reshape, but not one that others come after."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.body(x))).unflatten(-1, (2, 16)).softmax(-1)

    module = Apply(forward, body=nn.Linear(64, 64), head=nn.Linear(64, 32))
    program = capture(module.eval(), (normal(2, 64),))
    formats = quantized(program, head_bits=8).plan["formats"]
    assert formats == {"body": "int4-g32", "head": "int8-g32"}
    residual = Apply(lambda m, x: x + m.body(x), body=nn.Linear(64, 64))
    formats = quantized(capture(residual.eval(), (normal(2, 64),)), head_bits=8).plan["formats"]
    assert formats == {"body": "int4-g32"}


def test_small_heads_keep_sixteen_bits() -> None:
    """Where 16 bits cost the file little; a head that is most of the model is worth its kernel."""

    def formats(body: int, head: int) -> dict[str, str]:
        module = Apply(
            lambda m, x: m.head(torch.relu(m.body(x))),
            body=nn.Linear(64, body), head=nn.Linear(body, head),
        )  # fmt: skip
        program = capture(module.eval(), (normal(2, 64),))
        return dict(quantized(program, head_bits=16, min_size=1).plan["formats"])

    assert formats(body=256, head=4) == {"body": "int4-g32", "head": "fp16"}
    assert formats(body=64, head=64) == {"body": "int4-g32", "head": "int4-g32"}
    program = tiny.decoder(width=64).capture()
    tied = quantized(program, head_bits=16, min_size=1)
    assert any("also a table" in skip.reason for skip in tied.steps[-1].skipped)
    with pytest.raises(UsageError, match="no ranges"):
        make_pass("quantize-weights", {"ranges": "output", "head_bits": 16})


def test_mse_ranges_are_closer_than_min_max() -> None:
    program = tiny.decoder(width=64).capture()
    drifts = {r: quantized(program, ranges=r).steps[-1].drift for r in ("mse", "min-max")}
    assert drifts["mse"] is not None and drifts["min-max"] is not None
    assert drifts["mse"].sqnr_db > drifts["min-max"].sqnr_db


def test_the_result_does_not_depend_on_the_batch() -> None:
    # Activations are rounded per row and block, so no row sees another.
    program = capture(nn.Linear(64, 16).eval(), (normal(2, 64),), ({0: torch.export.Dim("b")},))
    result = quantized(program)
    rows = normal(5, 64, seed=3)
    rows[0] *= 1000
    together, alone = result.run(rows), torch.cat([result.run(row[None]) for row in rows])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 8}, {"bits": 4, "head_bits": 8}])
def test_widths_without_a_float_kernel_are_widened_when_loaded(options: dict[str, int]) -> None:
    given = {**options, "activations": "float"}
    notice = make_pass("quantize-weights", given).notice("onnx")
    assert notice is not None and "afloat has no kernel on this target" in notice
    assert make_pass("quantize-weights", options).notice("onnx") is None
    program = capture(nn.Linear(64, 32).eval(), (normal(9, 64),))
    rounded = quantized(program, min_size=0, **given)
    with lower(rounded, "onnx").load(threads=1) as run:
        found = torch.as_tensor(run(*program.args))
    assert torch.allclose(found, rounded.run(*program.args), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["quantize-weights", "quantize-dynamic", "quantize-embeddings", "store-half"]
)
def test_a_weight_that_is_not_finite_is_named(name: str) -> None:
    # A sound model at capture: the value arrives with a later change of the weights.
    program = tiny.decoder().capture()
    for part in program.graph_module.modules():
        for buffer in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            if buffer.dim() == 2:
                buffer.data = buffer.data.clone()
                buffer.data[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"the weight of '[\w.]+' holds 1 values") as caught:
        Pipeline([make_pass(name, {"min_size": 0})]).run(program)
    assert caught.value.code == "non-finite-weight"
    assert ".py:" in (caught.value.site or "")
