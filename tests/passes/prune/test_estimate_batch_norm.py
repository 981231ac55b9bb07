"""estimate-batch-norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.pass_base import PassContext
from mopt.passes.prune._moments import channel_moments
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.prune.costs import BlockModel
from tests.passes.quantize.calibrated import batches_for

PRUNE = ("prune-channels", {"ratio": 0.4, "multiple": 1, "refit": False})
FOLD = ("fold-batch-norm", {})


def trained(made: Sample) -> Sample:
    """With norms that have seen the data, as those of trained models have."""
    for module in made.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    made.module.train()
    with torch.no_grad():
        for batch in batches_for(made, 6):
            made.module(*batch)
    made.module.eval()
    return made


def pruned(made: Sample, *before: Any) -> tuple[Program, Program, Calibration]:
    """A program, the same without channels, and data."""
    program = Pipeline([make_pass(*one) for one in before]).run(trained(made).capture())
    data = Calibration(batches_for(made, 6), program)
    ctx = PassContext(cost_model=BlockModel(1))
    return program, Pipeline([make_pass(*PRUNE)]).run(program, ctx), data


def case(name: str, made: Sample, changed: bool, *before: Any, **more: Any) -> Case:
    program, result, data = pruned(made, *before)
    return Case(name, result, changed, {}, calibration=lambda: data,
                context={"unrounded": program}, **more)  # fmt: skip


# Random weights: means and variances say little about single values.
CASES = [
    case("norms", tiny.small_cnn(16), True, tolerance=2.0),
    case("folded", tiny.small_cnn(16), True, FOLD, tolerance=2.0),
    case("no-norms", tiny.mlp(), False, skipped="there is no batch norm"),
    Case("nothing-lost", tiny.mlp(), False, skipped="nothing was lost",
         calibration=lambda: Calibration(batches_for(tiny.mlp()), tiny.mlp().capture())),
]  # fmt: skip


@pytest.mark.parametrize("before", [(), (FOLD,)])
def test_channels_get_back_the_moments_of_the_original(before: tuple[Any, ...]) -> None:
    program, result, data = pruned(tiny.small_cnn(16), *before)
    ctx = PassContext(calibration=data, unrounded=program)
    fixed = Pipeline([make_pass("estimate-batch-norm", {})]).run(result, ctx)
    found = fixed.steps[-1].stats["distance"]
    assert found["after"] < 0.9 * found["before"]
    kind = "conv2d" if before else "batch_norm"

    def moments(one: Program) -> tuple[torch.Tensor, torch.Tensor]:
        name = [n.name for n in one.graph.nodes if kind in n.name][-1]
        seen: list[torch.Tensor] = []
        for args, kwargs in data:
            one.interpret(
                lambda n, value: seen.append(value) if n.name == name else None, args, kwargs
            )
        return channel_moments(seen)

    if before:
        node = [n.name for n in fixed.graph.nodes if kind in n.name][-1]
        kept = torch.as_tensor(fixed.plan["kept_channels"].get(node, range(16)))
        for mine, theirs in zip(moments(fixed), moments(program), strict=True):
            assert torch.allclose(mine, theirs[kept], rtol=1e-3, atol=1e-4)
    else:  # a norm with its own statistics gives beta and gamma squared
        call = [n for n in fixed.graph.nodes if kind in n.name][-1]
        gamma, beta = (fixed.weight(call.args[at]).double() for at in (1, 2))
        mean, variance = moments(fixed)
        assert torch.allclose(mean, beta, atol=1e-4)
        assert torch.allclose(variance, gamma.square(), rtol=0.02, atol=1e-4)


def test_it_needs_data() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("estimate-batch-norm", {})]).run(tiny.mlp().capture())
