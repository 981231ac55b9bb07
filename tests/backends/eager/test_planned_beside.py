"""Results that lie beside the arena: allocated in every run, or written over an input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mopt.allocations import record_allocations
from mopt.backends.eager.plan_file import read_layout
from mopt.backends.eager.planned import PlannedGraph
from mopt.errors import ArtifactError
from mopt.lowering import lower
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests.tiny import Apply, normal, sample


def planned() -> Program:
    """Elementwise calls, a view, several results of one call, and a large result handed out.

    Whatever lay in an arena would be there beside the large result, too.
    """

    def function(_: Apply, x: Tensor) -> tuple[Tensor, Tensor]:
        h = ((x + 1).sin() * 2).relu().view(-1, 32)
        top, where = h.topk(3)
        return torch.outer(top.view(-1), top.view(-1)), where

    program = sample(Apply(function), normal(16, 32)).capture()
    return Pipeline([make_pass("plan-memory", {})]).run(program, PassContext(backend="eager"))


def executor(program: Program) -> PlannedGraph:
    names = {node: node.name for node in program.graph.nodes}
    return PlannedGraph(program.graph_module, read_layout(program.plan["memory"]), names)


def test_the_peak_is_that_of_the_order() -> None:
    program = planned()
    plan = program.plan["memory"]
    assert plan["gap"] == 0 and plan["arena_bytes"] < 2048
    over = {row["id"] for row in plan["buffers"] if row["where"] == "beside" and row["shares"]}
    assert {"sin", "mul", "relu"} <= over
    lower(program, "eager")  # refuses a run that takes more, or gives other bits
    run = executor(program)
    x = normal(16, 32, seed=3)
    kept = x.clone()
    with torch.no_grad(), record_allocations() as log:
        first = run(x)
    assert log.total.peak + plan["arena_bytes"] <= plan["peak_bytes"] * 1.01 + 64
    again = [value.clone() for value in first]
    run(normal(16, 32, seed=4))
    assert torch.equal(x, kept)
    want = program.run_flat(x)
    for value, same, wanted in zip(first, again, want, strict=True):
        assert torch.equal(value, same) and torch.equal(value, wanted)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ("x", "is to be written over 'x'"),  # an input of the caller
        ("nothing", "KeyError"),
        ("outer", "does not read in the same form"),
    ],
)
def test_only_inputs_of_a_call_that_a_call_made_are_written_over(shares: str, words: str) -> None:
    program = planned()
    plan = copy.deepcopy(program.plan["memory"])
    rows = {row["id"]: row for row in plan["buffers"]}
    rows["mul"]["shares"] = shares
    plan["buffers"] += [{**rows["mul"], "id": "x", "where": "arena", "offset": 0, "shares": None}]
    program.plan["memory"] = plan
    with pytest.raises(ArtifactError, match=words) as caught:
        executor(program)
    assert caught.value.code == "malformed-plan"
