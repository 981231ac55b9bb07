"""Runs a planned program once and holds the allocator's peak against the plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopt.allocations import record_allocations
from mopt.backends.eager.plan_file import read_layout
from mopt.backends.eager.planned import PlannedGraph
from mopt.backends.eager.recorder import same_bits
from mopt.errors import LoweringError
from mopt.program import Program, site_of
from mopt.storages import graph_key

# The allocator rounds up to this many bytes.
_UNIT = 64
_SLACK = 0.01


def replay(program: Program, plan: dict[str, Any]) -> int:
    """Run ``program`` by its plan on the example inputs; the peak of the allocator in bytes.

    The arena and everything allocated beside it count, weights and inputs do not. Raises
    LoweringError ``stale-plan`` if the plan belongs to another graph, ``memory-plan-missed`` if the
    peak is more than 1 % and one unit above the plan, ``planned-output`` if an output differs from
    the plain run's in any bit.
    """
    if plan["key"] != graph_key(program):
        raise LoweringError(
            "the memory plan belongs to another graph",
            code="stale-plan",
            hint="make plan-memory the last pass of the recipe",
        )
    names = {node: node.name for node in program.graph.nodes}
    graph = PlannedGraph(program.graph_module, read_layout(plan), names)
    inputs = program.flat_inputs(program.args, program.kwargs)
    with torch.no_grad(), record_allocations() as log, log.section("run"):
        found = graph(*inputs)
    measured = log.sections["run"].peak + graph.arena.numel()
    if measured > plan["peak_bytes"] * (1 + _SLACK) + _UNIT:
        raise LoweringError(
            f"the planned run allocates {measured} bytes, the plan says {plan['peak_bytes']}",
            code="memory-plan-missed",
            hint="another number of threads than when the plan was made changes what calls take",
        )
    _check_outputs(program, found)
    return measured


def _check_outputs(program: Program, found: Any) -> None:
    expected = program.run_flat(*program.args, **program.kwargs)
    output = program.graph.output_node()
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        if isinstance(want, Tensor) and not same_bits(want, got):
            raise LoweringError(
                f"output {index} of the planned run differs from the plain run's",
                code="planned-output",
                site=site_of(output.all_input_nodes[0]) if output.all_input_nodes else None,
                hint="leave plan-memory out of the recipe and report the model",
            )
