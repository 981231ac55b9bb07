"""remove-no-ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample, assert_same, outputs
from tests.tiny import Apply, normal, sample


def of(
    function: Callable[..., object], *inputs: Tensor, dynamic: bool = True
) -> Callable[..., Sample]:
    """A sample of ``function(x, ...)`` without weights."""
    return lambda: sample(
        Apply(lambda m, *xs: function(*xs)), *(inputs or (normal(3, 4, 6),)), dynamic=dynamic
    )


def gelu_mlp_with_dropout() -> Sample:
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
    return sample(layers, normal(4, 8), dynamic=True)


def written_copy(x: Tensor) -> Tensor:
    y = x * 2
    z = y.clone()
    z.add_(1)
    return y * z


def copy_of_what_is_written(x: Tensor) -> Tensor:
    y = x * 2
    z = y.clone()
    y.add_(1)
    return y * z


def two_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    return y, y.clone()


COUNT = torch.arange(6).reshape(2, 3)
TWICE = torch.ones(2, 1, 1)

CASES = [
    Case("dropout-in-eval", gelu_mlp_with_dropout, changed=True),
    Case(
        "transposed-twice",
        of(lambda x: x.transpose(1, 2).sin().sin() + x.transpose(1, 2).transpose(1, -1).mT),
        changed=True,
    ),
    Case("permuted-back", of(lambda x: x.permute(2, 0, 1).permute(1, 2, 0) + 1), changed=True),
    Case("reshaped-back", of(lambda x: x.view(-1, 24).view(-1, 4, 6) + 1), changed=True),
    Case("same-shape", of(lambda x: x.reshape(-1, 4, 6).expand(-1, 4, 6) + 1), changed=True),
    Case("whole-slice", of(lambda x: x[:, 0:4, :10] + 1), changed=True),
    Case("cast-to-own-dtype", of(lambda x: x.to(torch.float32).float() + 1), changed=True),
    Case("widened-and-back", of(lambda x: x.double().float() + 1), changed=True),
    Case("copies-inside", of(lambda x: (x * 2).clone().contiguous().detach() + 1), changed=True),
    Case("times-one", of(lambda x: (x * 1 / 1.0 - 0.0) + 1), changed=True),
    Case("plus-zero-integer", of(lambda x: (x + 0) * 2, COUNT), changed=True),
    Case("plus-negative-zero", of(lambda x: (x + -0.0) * 2), changed=True),
    Case("no-padding", of(lambda x: F.pad(x, (0, 0, 0, 0)) * 2), changed=True),
    Case("one-part", of(lambda x: torch.cat([x * 2]) + 1), changed=True),
    Case(
        "mask-that-hides-nothing",
        lambda: sample(
            Apply(
                lambda m, x: torch.where(m.yes, x * 2, 0.0).masked_fill(~(m.yes & (x > 0)), 1.0),
                yes=torch.ones(4, 6, dtype=torch.bool),
            ),
            normal(3, 4, 6),
            dynamic=True,
        ),
        changed=True,
    ),
    Case("unused-result", of(lambda x: (x.sin(), x.cos())[0]), changed=True),
    Case("returned-view-of-an-input", of(lambda x: (x.view(-1, 4, 6), x + 1)), changed=True),
    # ---- what only looks like nothing
    Case("nothing-to-do", tiny.linear, changed=False),
    Case("plus-zero-float", of(lambda x: (x + 0) * 2), changed=False, skipped="-0.0"),
    Case("minus-negative-zero", of(lambda x: (x - -0.0) * 2), changed=False, skipped="-0.0"),
    Case("promotes", of(lambda x: x * torch.ones(1, dtype=torch.float64)), changed=False),
    Case("broadcasts", of(lambda x: x * TWICE, normal(1, 3, 4), dynamic=False), changed=False),
    # (the assertions about dtypes go, the casts stay)
    Case("narrowed-and-back", of(lambda x: x.half().float() + 1), changed=True),
    Case("integer-and-back", of(lambda x: x.long().float() + 1), changed=True),
    Case("square-transpose", of(lambda x: x.t() + 1, normal(4, 4), dynamic=False), changed=False),
    Case("permuted-on", of(lambda x: x.permute(2, 0, 1).permute(2, 0, 1)), changed=False),
    Case("part-of-an-axis", of(lambda x: x.narrow(1, 1, 3) + 1), changed=False),
    Case("laid-out-anew", of(lambda x: x.transpose(1, 2).contiguous() + 1), changed=False),
    Case("written-copy", of(written_copy), changed=False, skipped="written"),
    Case("copy-of-what-is-written", of(copy_of_what_is_written), changed=False, skipped="written"),
    Case("two-outputs", of(two_outputs), changed=False, skipped="share memory"),
    Case("returned-copy-of-an-input", of(lambda x: x.clone()), changed=False, skipped="an input"),
    Case(
        "returned-copy-of-a-weight",
        lambda: sample(Apply(lambda m, x: (x + m.w, m.w.clone()), w=torch.ones(4)), normal(3, 4)),
        changed=False,
        skipped="a weight",
    ),
    Case("dropout-that-is-on", of(lambda x: F.dropout(x, 0.5, True).isnan()), changed=False),
]


def run(program: Program) -> Program:
    return Pipeline([make_pass("remove-no-ops", {})]).run(program)


def test_a_returned_copy_goes_when_its_source_is_not_seen_otherwise() -> None:
    result = run(of(lambda x: (x * 2).clone())().capture())
    assert result.steps[-1].stats["by_operator"] == {"clone": 1}
    x = normal(3, 4, 6)
    assert outputs(result, (x,), {})[0].data_ptr() != x.data_ptr()


def test_two_returned_copies_of_one_value_stay_two_tensors() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y.clone(), y.clone()

    result = run(of(forward)().capture())
    first, second = outputs(result, (normal(3, 4, 6),), {})
    assert first.data_ptr() != second.data_ptr()


def test_negative_zero_survives() -> None:
    zero = torch.full((2, 2), -0.0)
    for function in (lambda x: (x * 1.0).abs() * x, lambda x: (x - 0) * 2, lambda x: (x + 0) * 2):
        program = of(function, zero)().capture()
        assert_same(outputs(program, (zero,), {}), outputs(run(program), (zero,), {}), "-0.0")


def test_the_size_that_only_an_assertion_read_goes_too() -> None:
    def forward(x: Tensor) -> Tensor:
        torch._check(x.shape[0] > 1)
        return x + 1

    result = run(of(forward)().capture())
    assert [n.op for n in result.nodes] == ["placeholder", "call_function", "output"]


def test_an_assertion_on_a_size_that_depends_on_the_data_stays() -> None:
    def forward(x: Tensor) -> Tensor:
        chosen = torch.nonzero(x > 0)
        torch._check(chosen.shape[0] >= 2)
        return chosen * 2

    program = of(forward, dynamic=False)().capture()
    assertions = [n for n in program.nodes if "_assert_scalar" in str(n.target)]
    assert assertions
    result = run(program)
    assert len([n for n in result.nodes if "_assert_scalar" in str(n.target)]) == len(assertions)
    with pytest.raises(RuntimeError):
        result.run(torch.full((3, 4, 6), -1.0))
