"""The planned executor: every program of its plan runs as without it, within the memory it says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.allocations import record_allocations
from mopt.backends.eager.plan_file import read_layout
from mopt.backends.eager.planned import PlannedGraph
from mopt.backends.eager.recorder import record_calls, same_bits
from mopt.errors import ArtifactError, LoweringError
from mopt.lowering import load, lower
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests.case import Sample, grown_inputs, other_inputs
from tests.strategies import samples
from tests.tiny import Apply, normal, sample


def planned(program: Program, **options: Any) -> Program:
    """The program after plan-memory for the eager backend."""
    return Pipeline([make_pass("plan-memory", options)]).run(program, PassContext(backend="eager"))


def of(function: Any, *inputs: Tensor) -> Program:
    """A captured function without weights."""
    return sample(Apply(lambda m, *xs: function(*xs)), *inputs).capture()


def executor(program: Program) -> PlannedGraph:
    """The planned graph of a program that has a plan."""
    names = {node: node.name for node in program.graph.nodes}
    layout = read_layout(program.plan["memory"])
    return PlannedGraph(program.graph_module, layout, names)


@settings(max_examples=25)
@given(samples(max_steps=8))
def test_planned_runs_equal_plain_ones(sample: Sample) -> None:
    program = sample.capture()
    result = planned(program)
    lower(result, "eager")  # replays the plan: outputs and peak
    run = executor(result)
    sets = [other_inputs(program, seed=1), other_inputs(program, seed=2)]
    grown = grown_inputs(program, times=2)
    for args, kwargs in [*sets, *([grown] if grown else [])]:
        plain = program.run_flat(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        with torch.no_grad():
            found = run(*result.flat_inputs(args, kwargs))
        for want, got in zip(plain, found, strict=True):
            assert not isinstance(want, Tensor) or same_bits(want, got)


def test_outputs_do_not_change_with_the_next_run() -> None:
    program = planned(of(lambda x: (x * 2 + 1).relu().view(-1) * 3, normal(64, 64)))
    run = executor(program)
    first = run(normal(64, 64, seed=1))[0]
    kept = first.clone()
    run(normal(64, 64, seed=2))
    assert torch.equal(first, kept)


def test_results_lie_in_the_arena_and_take_over_their_inputs() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(6):
            x = (x + 1).sin()
        return x.sum()

    program = planned(of(chain, normal(128, 128)))
    plan = program.plan["memory"]
    assert plan["arena_bytes"] == 128 * 128 * 4
    assert sum(row["shares"] is not None for row in plan["buffers"]) == 11
    run = executor(program)
    x = normal(128, 128)
    run(x)
    with record_allocations() as log:
        run(x)
    assert log.total.peak < 1024


def test_a_conv_net_in_channels_last_needs_only_its_arena() -> None:
    net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1),
                        nn.AdaptiveAvgPool2d(1))  # fmt: skip
    net = net.eval().to(memory_format=torch.channels_last)
    x = normal(1, 16, 64, 64).to(memory_format=torch.channels_last)
    result = planned(Sample(net, (x,)).capture())
    calls = [step["call"] for step in result.plan["memory"]["steps"]]
    assert calls.count("conv2d-packed") == 2
    assert result.plan["memory"]["peak_bytes"] < 1.05 * (32 + 16) * 64 * 64 * 4
    lower(result, "eager")


def test_an_artifact_runs_by_its_plan(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    program = Sample(net, (normal(4, 32),)).capture()
    artifact = lower(planned(program), "eager")
    artifact.save(tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["measured_bytes"] <= 1.01 * plan["peak_bytes"] + 64
    x = normal(4, 32, seed=5)
    with load(tmp_path / "out") as run:
        assert torch.equal(run(x), program.run(x))
        # A transposed input is another layout of the same sizes.
        assert torch.equal(run(normal(32, 4).T), program.run(normal(32, 4).T.contiguous()))


def test_a_stale_plan_and_a_missed_peak_are_refused() -> None:
    program = planned(of(lambda x: x.exp().sum(), normal(64, 64)))
    low = program.copy()
    low.plan["memory"]["peak_bytes"] //= 2
    with pytest.raises(LoweringError, match=r"allocates 16.* the plan says 8") as missed:
        lower(low, "eager")
    assert missed.value.code == "memory-plan-missed"
    stale = Pipeline([make_pass("fold-constants", {})]).run(program)
    stale.plan["memory"]["key"] = "0"
    with pytest.raises(LoweringError, match="another graph") as caught:
        lower(stale, "eager")
    assert caught.value.code == "stale-plan"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("arena_bytes", -1, "no count"),
        ("arena_bytes", 8, "does not fit in 8 bytes"),
        ("arena_bytes", 1 << 60, "no count"),
        ("steps", [{"node": "exp", "call": "system"}], "no known way"),
        ("steps", 3, "not iterable"),
        ("schema", 9, "another schema"),
    ],
)
def test_malformed_plans_are_refused(where: str, value: Any, message: str) -> None:
    program = planned(of(lambda x: x.exp().sum(), normal(64, 64)))
    data = copy.deepcopy(program.plan["memory"])
    data[where] = value
    with pytest.raises(ArtifactError, match=message):
        read_layout(data)


def test_calls_that_cannot_be_placed_are_measured() -> None:
    layer = nn.LayerNorm(256)
    _, facts = record_calls(Sample(layer, (normal(64, 256),)).capture())
    # The kernel also keeps mean and deviation of every row.
    assert facts["layer_norm"].call == ""
    assert facts["layer_norm"].plain_bytes == 2 * 64 * 4


def test_random_calls_and_writes_keep_their_order() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.sin()
        before = F.dropout(y, 0.5, training=True)
        y.mul_(2)
        return before + F.dropout(y, 0.5, training=True).view(-1, 1).view(64, 64)

    program = of(function, normal(64, 64))
    result = planned(program)
    torch.manual_seed(3)
    want = program.run(normal(64, 64))
    run = executor(result)
    torch.manual_seed(3)
    assert torch.equal(run(normal(64, 64))[0], want)
