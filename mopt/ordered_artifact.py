"""A model lowered with its calls in a planned order, where that order really takes less memory.

A runtime may sort the nodes of a file by itself, so a plan is no promise there: both orders are run
in fresh processes, and the planned one is kept only where it helps.
"""

from __future__ import annotations

from dataclasses import dataclass

from mopt.disk import scratch
from mopt.lowering import Artifact, lower
from mopt.measure import measure_one
from mopt.program import Program
from mopt.proof import subject, write_example_inputs

# Processes for each order. What the heap rounds and a thread takes differs by less than this share.
SAMPLES = 3
_LEAST_GAIN = 0.01


@dataclass(frozen=True)
class OrderTried:
    """The artifact that is kept, and why.

    ``written_bytes`` and ``planned_bytes`` are the largest growth of private memory of a fresh
    process that loads and runs the model, in the order as written and in the planned one; None
    where the plan moved no call, so that there was nothing to compare.
    """

    artifact: Artifact
    kept_plan: bool
    written_bytes: int | None
    planned_bytes: int | None


def lower_in_better_order(
    program: Program, planned: Program, backend: str, *, threads: int | None = 1
) -> OrderTried:
    """Lower ``program``, and ``planned``, the same calls in another order, and keep the better.

    The planned order is kept where every process that ran it took at least 1 % less than every
    process that ran the other. Raises what lowering and measuring raise.
    """
    plain = lower(program, backend)
    if [n.name for n in program.graph.nodes] == [n.name for n in planned.graph.nodes]:
        return OrderTried(plain, False, None, None)
    ordered = lower(planned, backend)
    with scratch("mopt-order") as folder:
        inputs = folder / "inputs.npz"
        write_example_inputs(plain, inputs)
        written, moved = (
            [s.peak_bytes for s in measure_one(
                subject(artifact, inputs, threads, label), samples=SAMPLES).samples]
            for artifact, label in ((plain, "as written"), (ordered, "planned order"))
        )  # fmt: skip
    helps = max(moved) < (1 - _LEAST_GAIN) * min(written)
    return OrderTried(ordered if helps else plain, helps, max(written), max(moved))
