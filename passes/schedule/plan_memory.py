"""plan-memory: an order and a place for everything."""

from __future__ import annotations

from dataclasses import dataclass

from mopt.pass_base import Numerics, Pass, PassContext, PassResult, option, register_pass
from mopt.passes.schedule._plan import plan_program
from mopt.program import Program
from mopt.registry import find_backend


@register_pass("plan-memory", numerics=Numerics.EXACT)
@dataclass(frozen=True, kw_only=True)
class PlanMemory(Pass):
    """Order the calls for the least peak of memory and give every result an offset.

    ## When to use
    Last: a later edit of the graph makes the plan worthless, and a backend refuses it then.

    ## Accuracy
    Exact: the same calls on the same values. Calls that write to memory others read, draw random
    numbers or may stop the run keep their order.

    ## Limits
    Sizes are those of the example inputs; with dynamic shapes the plan holds for these sizes and
    other ones run without it. Where the backend can run calls in given memory (eager), the program
    is run once to see what every call allocates by itself on this machine.

    ## Example
    `a = big(x); b = big(y); c = small(a); d = small(b)` becomes `a, c, b, d`: the two large
    results are never alive together, and lie at the same offset.
    """

    seconds: float = option(30.0, min=0.1, help="time for order and offsets together")
    keep_order: bool = option(False, help="only place results, leave the calls where they are")

    for_device: bool = option(
        False, help="plan one arena for everything, inputs and outputs too, as small devices do"
    )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Reorder the graph and store the plan in ``program.plan["memory"]``."""
        record = getattr(find_backend(ctx.backend), "record_calls", None)
        if self.for_device:
            record = None
        plan = plan_program(
            program,
            recorded=record(program) if record is not None else None,
            backend=ctx.backend if record is not None else "",
            time_limit=self.seconds,
            seed=ctx.seed,
            keep_order=self.keep_order,
        )
        program.plan["memory"] = plan.data
        told = ("peak_bytes", "arena_bytes", "lower_bound_bytes", "input_order_bytes", "gap")
        return PassResult(changed=plan.moved, stats={key: plan.data[key] for key in told})
