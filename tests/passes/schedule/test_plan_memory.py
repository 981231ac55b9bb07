"""plan-memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mopt.memory_check import check_plan
from mopt.passes.schedule._plan import plan_program
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from mopt.storages import trace_storages
from tests.case import Case, Sample
from tests.tiny import Apply, normal, sample

KB = 1024


def of(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> Sample:
    """A sample of ``function(x, ...)`` without weights."""
    return sample(
        Apply(lambda m, *xs: function(*xs)), *(inputs or (normal(16, 16),)), dynamic=dynamic
    )


def two_large_ones_together(x: Tensor) -> Tensor:
    large = x.repeat(8, 8), x.repeat(8, 8) * 2
    small = large[0].sum(0), large[1].sum(0)
    return small[0] + small[1]


def written_between(x: Tensor) -> Tensor:
    """The write may not move before the first read, though that would be cheaper."""
    y = x.repeat(4, 4)
    before = y.repeat(2, 2).sum(0)
    y.add_(1)
    return before + y.repeat(2, 2).sum(0)


def view_of_the_first(x: Tensor) -> Tensor:
    first = x.repeat(8, 8)
    seen = first.view(-1)[:64]
    second = x.repeat(8, 8)
    return seen.sum() + second.sum()


CASES = [
    Case("two-large-ones-together", of(two_large_ones_together, dynamic=True), changed=True),
    Case("a-view-keeps-its-storage", of(view_of_the_first), changed=True),
    Case("order-kept", of(two_large_ones_together), changed=False, options={"keep_order": True}),
    Case("writes-stay-in-place", of(written_between), changed=False),
    Case("output-is-the-input", of(lambda x: x.view(-1)), changed=False),
]


def plan_of(source: Sample, **options: Any) -> dict[str, Any]:
    """The plan of a device without workspaces."""
    return plan_program(source.capture(), **options).data


def test_the_plan_of_two_large_results_holds_one_at_a_time() -> None:
    before = plan_of(of(two_large_ones_together), keep_order=True)
    after = plan_of(of(two_large_ones_together))
    assert before["peak_bytes"] - after["peak_bytes"] == 64 * KB - 128 * 4
    assert after["lower_bound_bytes"] == after["peak_bytes"]


def test_inputs_and_outputs_are_part_of_a_device_plan() -> None:
    rows = {row["id"]: row for row in plan_of(of(lambda x: x.exp().sum(0)))["buffers"]}
    assert rows["x"]["lower"] == 0 and rows["x"]["upper"] == 1
    assert rows["exp"]["shares"] is None  # an input belongs to the caller
    assert rows["sum_1"]["bytes"] == 64


def test_a_view_and_a_write_belong_to_the_storage_they_look_at() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.exp()
        part = y.view(-1)[:32]
        part.mul_(2)
        return y.sum()

    program = of(function).capture()
    trace = trace_storages(program)
    nodes = {node.name: node for node in program.graph.nodes}
    assert trace.of(nodes["mul_"]) == trace.of(nodes["exp"]) == trace.of(nodes["view"])
    plan = plan_program(program)
    assert [row["upper"] for row in plan.data["buffers"] if row["id"] == "exp"] == [5]


def test_several_results_of_one_call_are_several_buffers() -> None:
    program = of(lambda x: torch.topk(x, 4)[0].sum()).capture()
    ids = [row["id"] for row in plan_program(program).data["buffers"]]
    assert {"topk", "topk.1"} <= set(ids)


@pytest.mark.parametrize("make", [nn.Tanh, nn.GELU, nn.Sigmoid])
def test_elementwise_chains_use_one_buffer(make: Callable[[], nn.Module]) -> None:
    chain = nn.Sequential(nn.Linear(32, 64), *[make() for _ in range(5)], nn.Linear(64, 8))
    plan = plan_program(Sample(chain.eval(), (normal(4, 32),)).capture())
    assert plan.data["arena_bytes"] == 4 * (32 + 64) * 4
    assert check_plan(plan.problem, plan.layout) == []


def test_a_dynamic_plan_says_so_and_holds_for_the_example() -> None:
    source = of(two_large_ones_together, dynamic=True)
    assert plan_of(source)["dynamic"]
    assert plan_of(source)["peak_bytes"] == plan_of(of(two_large_ones_together))["peak_bytes"]


def test_sizes_that_depend_on_values_are_planned_by_a_run() -> None:
    program = of(lambda x: x[x > 0].exp().sum()).capture()
    positive = int((program.args[0] > 0).sum())
    rows = {row["id"]: row for row in plan_program(program).data["buffers"]}
    assert rows["exp"]["bytes"] == 4 * positive


def test_the_pass_tells_its_peaks() -> None:
    program: Program = of(two_large_ones_together).capture()
    step = Pipeline([make_pass("plan-memory", {})]).run(program).steps[-1]
    assert step.stats["peak_bytes"] < step.stats["input_order_bytes"]
    assert step.stats["gap"] == 0
