"""merge-duplicates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample, outputs
from tests.tiny import Apply, normal, sample


def twin_layers(*, same: bool, dtype: torch.dtype = torch.float32) -> Sample:
    """Two linear layers with their own weights, of equal content or not."""
    found = sample(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), normal(3, 6), dynamic=True)
    assert isinstance(found.module, nn.Sequential)
    if same:
        found.module[1].load_state_dict(found.module[0].state_dict())
    found.module.to(dtype)
    return Sample(found.module, (normal(3, 6).to(dtype),), found.dynamic_shapes)


def of(function: object, *inputs: Tensor) -> Sample:
    return sample(Apply(lambda m, *xs: function(*xs)), *(inputs or (normal(3, 4),)), dynamic=True)  # type: ignore[operator]


def written_between(x: Tensor) -> Tensor:
    y = x * 2
    first = y.sin()
    y.add_(1)
    return first + y.sin()


def one_layout() -> Sample:
    """A square weight stored by rows, and one with the same bytes seen by columns."""
    symmetric = torch.eye(4) + 0.25
    module = Apply(lambda m, x: x @ m.a + x @ m.b, a=symmetric, b=symmetric.clone().t())
    return Sample(module, (normal(3, 4),))


def fresh_norm() -> Sample:
    """An untrained batch norm: its bias equals its mean, its weight its variance."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    return Sample(module.eval(), (normal(2, 3, 8, 8),))


COUNT = torch.arange(6)

CASES = [
    Case("sine-twice", lambda: of(lambda x: x.sin() + x.sin() * 2), changed=True),
    Case("chains", lambda: of(lambda x: (x.sin() + 1).exp() * (x.sin() + 1).exp()), changed=True),
    Case("equal-weights", lambda: twin_layers(same=True), changed=True),
    Case(
        "positions-of-every-layer",
        lambda: of(lambda x: x + torch.arange(4) * 2 + x * (torch.arange(4) * 2)),
        changed=True,
    ),
    Case("one-split", lambda: of(lambda x: x.chunk(2, 1)[0] + x.chunk(2, 1)[1]), changed=True),
    Case("two-views-returned", lambda: of(lambda x: (x.view(-1), x.view(-1))), changed=True),
    Case("a-parameter-and-a-buffer", fresh_norm, changed=False),
    Case("other-weights", lambda: twin_layers(same=False), changed=False),
    Case("nothing-twice", tiny.decoder, changed=False),
    Case("integer-and-float", lambda: of(lambda x: (x // 1) + (x // 1.0), COUNT), changed=False),
    Case("zero-and-negative-zero", lambda: of(lambda x: (x + 0.0) / (x + -0.0)), changed=False),
    Case("another-axis", lambda: of(lambda x: x.sum(0, True) + x.sum(1, True)), changed=False),
    Case("random", lambda: of(lambda x: (torch.rand(4) - torch.rand(4)) * 0 + x), changed=False),
    Case("written-between", lambda: of(written_between), changed=False),
    Case("two-outputs", lambda: of(lambda x: (x.sin(), x.sin())), changed=False, skipped="share"),
    Case("another-layout", one_layout, changed=False),
]


def test_equal_weights_are_stored_once() -> None:
    program = twin_layers(same=True).capture()
    result = Pipeline([make_pass("merge-duplicates", {})]).run(program)
    assert result.size_bytes() == program.size_bytes() // 2
    assert result.steps[-1].stats == {"weights": 2, "calls": 0, "bytes_saved": 42 * 4}


def test_tied_weights_save_nothing() -> None:
    module = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    module[1].weight = module[0].weight
    program = sample(module, normal(3, 6)).capture()
    result = Pipeline([make_pass("merge-duplicates", {})]).run(program)
    assert result.steps[-1].stats["bytes_saved"] == 0
    assert result.size_bytes() == program.size_bytes()


def test_outputs_stay_separate_tensors() -> None:
    result = Pipeline([make_pass("merge-duplicates", {})]).run(
        of(lambda x: (x.sin(), x.sin().view(-1))).capture()
    )
    first, second = outputs(result, (normal(3, 4),), {})
    assert first.data_ptr() != second.data_ptr()


def test_weights_of_other_dtype_with_equal_bytes_stay() -> None:
    module = Apply(
        lambda m, x: x * m.a + m.b, a=torch.zeros(4), b=torch.zeros(4, dtype=torch.int32)
    )
    program = Sample(module, (normal(3, 4),)).capture()
    result = Pipeline([make_pass("merge-duplicates", {})]).run(program)
    assert not result.steps[-1].changed
