"""fold-constants."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import mopt.ops  # noqa: F401  (registers the operators)
from mopt.pipeline import Pipeline
from mopt.program import Program, iter_calls
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample, assert_same, outputs, same_bits
from tests.tiny import Apply, normal, sample

aten = torch.ops.aten


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def shared_view_of_large_weight() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.table[:4, :8] * x + (x @ m.table[:8]).sum()

    return sample(Apply(forward, table=weight(2048, 256)), normal(4, 8))


def written_constant() -> Sample:
    """A buffer that the graph itself fills in: its parts are not constant."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        mask = torch.zeros(4)
        mask[1] = x.sum()
        return x + mask + torch.zeros(4)

    return sample(Apply(forward), normal(3, 4))


def random_values() -> Sample:
    return sample(Apply(lambda m, x: x + torch.rand(4) * 0), normal(3, 4))


def compressed_weight() -> Program:
    program = tiny.linear().capture()
    (call,) = iter_calls(program, aten.linear.default)
    codes = torch.ones(4, 8, dtype=torch.int8)
    arguments = [
        program.add_weight(name, tensor, call)
        for name, tensor in {
            "codes": codes, "scale": torch.rand(4), "zero": torch.zeros(4, dtype=torch.int8),
        }.items()
    ]  # fmt: skip
    full = program.insert_call(torch.ops.mopt.dequantize.default, (*arguments, 0), like=call)
    call.args = (call.args[0], full, *call.args[2:])
    program.refresh()
    return program


CASES = [
    Case("two-weights-added", tiny.add_two_weights, changed=True),
    Case(
        "causal-mask",
        lambda: sample(
            Apply(lambda m, x: x.masked_fill(~torch.ones(5, 5).tril().bool(), -1e9)),
            normal(2, 5, 5),
            dynamic=True,
        ),
        changed=True,
    ),
    Case(
        "weight-norm",
        lambda: sample(parametrizations.weight_norm(nn.Linear(8, 4)), normal(3, 8), dynamic=True),
        changed=True,
    ),
    Case(
        "transposed-weight-keeps-its-layout",
        lambda: sample(Apply(lambda m, x: x @ m.w.t(), w=weight(4, 8)), normal(3, 8)),
        changed=True,
    ),
    Case(
        "large-but-replaces-its-source",
        lambda: sample(Apply(lambda m, x: x @ m.w.t().neg(), w=weight(64, 8)), normal(3, 8)),
        options={"max_bytes": 0},
        changed=True,
    ),
    Case(
        "half-weight-cast-to-float",
        lambda: Sample(
            Apply(lambda m, x: x * m.w.float(), w=torch.ones(8, dtype=torch.float16)),
            (normal(3, 8),),
        ),
        changed=True,
    ),
    Case("depends-on-input", tiny.add_weight_to_input, changed=False),
    Case(
        "too-large",
        lambda: tiny.outer(2048),
        options={"max_bytes": 8},
        changed=False,
        skipped="max_bytes",
    ),
    Case(
        "half-weight-would-double",
        lambda: Sample(
            Apply(lambda m, x: x @ m.w.float(), w=torch.ones(8, 8, dtype=torch.float16)),
            (normal(3, 8),),
        ),
        options={"max_bytes": 16},
        changed=False,
        skipped="256 bytes",
    ),
    Case("shared-view-of-large-weight", shared_view_of_large_weight, changed=True),
    Case("random-values", random_values, changed=False),
    Case(
        "depends-on-the-size-of-an-input",
        lambda: sample(
            Apply(lambda m, x: x + torch.arange(x.shape[0]).unsqueeze(1)),
            normal(3, 4),
            dynamic=True,
        ),
        changed=False,
    ),
    Case(
        "expanded-weight",
        lambda: sample(
            Apply(lambda m, x: torch.cat([m.w.expand(3, 4), x]), w=weight(1, 4)), normal(3, 4)
        ),
        changed=False,
    ),
    Case("compressed-weight", compressed_weight, changed=False),
    Case("excluded", tiny.add_two_weights, options={"skip": "*"}, changed=False),
]


def run(source: Sample, **options: object) -> Program:
    return Pipeline([make_pass("fold-constants", dict(options))]).run(source.capture())


def test_a_constant_that_is_written_to_is_not_stored() -> None:
    program = written_constant().capture()
    result = Pipeline([make_pass("fold-constants", {})]).run(program)
    for seed in (1, 2, 3):  # a stored mask would remember the first sum
        args = (normal(3, 4, seed=seed),)
        assert_same(outputs(program, args, {}), outputs(result, args, {}), f"run {seed}")


def test_the_stored_tensor_equals_what_was_computed() -> None:
    a, b = torch.tensor([1.0, -0.0]), torch.tensor([2.0, -0.0])
    result = run(Sample(Apply(lambda m, x: x * (m.a + m.b), a=a, b=b), (normal(3, 2),)))
    (stored,) = result.weights().values()
    assert same_bits(stored, torch.tensor([3.0, -0.0]))


def test_a_result_of_exactly_the_limit_is_stored() -> None:
    source = tiny.outer(8)  # 256 bytes from 32
    assert run(source, max_bytes=256).steps[-1].stats == {"folded": 1, "bytes_added": 224}
    assert not run(source, max_bytes=255).steps[-1].changed


def test_dtype_is_kept() -> None:
    half = torch.ones(4, dtype=torch.bfloat16)
    result = run(Sample(Apply(lambda m, x: x * (m.w + m.w).float(), w=half), (normal(3, 4),)))
    assert [tensor.dtype for tensor in result.weights().values()] == [torch.float32]
    result = run(Sample(Apply(lambda m, x: x * (m.w + m.w), w=half), (normal(3, 4).bfloat16(),)))
    assert [tensor.dtype for tensor in result.weights().values()] == [torch.bfloat16]
