"""Plan a training step within a memory budget: what is kept, what is computed again.

MODEL is what mopt compile takes; its example inputs are the batch. The budget is the peak of
forward and backward with weights, inputs and gradients, as bytes (2GiB) or as a share of the
activations (35%). Nothing is trained; use the same budget in
torch.compile(model, backend="mopt", options={"memory_budget": ...}).

Exit code 1 says that no plan within the budget was found.

\b
Examples:
  mopt train-plan zoo:gpt-12x768 --memory 1GiB
  mopt train-plan net.py:factory --memory 50% --optimizer adamw
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mopt.cli._command import Command, option
from mopt.cli._output import Column, Output
from mopt.cli._text import memory_size, milliseconds, plural, seconds
from mopt.model_source import load_source, parse_source

if TYPE_CHECKING:
    from mopt.training import GraphPlan

# Bytes of optimizer state for each parameter, as torch.optim keeps it in float32.
_STATE = {"none": 0, "sgd": 0, "momentum": 4, "adamw": 8}


@click.command(cls=Command, help=__doc__)
@click.argument("model")
@option("--memory", required=True, metavar="BYTES|SHARE", help="2GiB, 800MB, or 35%.")
@option(
    "--optimizer", type=click.Choice(list(_STATE)), default="none", show_default=True,
    help="Its state counts in the budget.",
)  # fmt: skip
@option(
    "--loss", type=click.Choice(["auto", "cross-entropy", "mean-square"]), default="auto",
    show_default=True, help="What is put on the model's first output.",
)  # fmt: skip
@option(
    "--costs", type=click.Choice(["measured", "estimated"]), default="measured", show_default=True,
    help="Seconds of calls: run each kind once on this machine, or from shapes.",
)  # fmt: skip
@option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), default=10.0, metavar="S",
    show_default=True, help="CPU seconds to look for a better plan.",
)  # fmt: skip
@option("--trust", is_flag=True, help="Load a .pt2 file, which runs code from it.")
@click.pass_obj
def command(
    out: Output,
    model: str,
    memory: str,
    optimizer: str,
    loss: str,
    costs: str,
    time_limit: float,
    trust: bool,
) -> None:
    parse_source(model)
    from mopt.recompute import parse_bytes
    from mopt.training import TrainingOptions
    from mopt.training_plan import plan_training

    parse_bytes(memory, "--memory")
    with out.user_code():
        source = load_source(model, trust=trust)
        count = sum(p.numel() for p in source.model.parameters() if p.requires_grad)
        options = TrainingOptions.of(
            {"memory_budget": memory, "costs": costs, "seconds": time_limit,
             "other_bytes": count * _STATE[optimizer]}
        )  # fmt: skip
        out.doing = "planning"
        found = plan_training(source.model, source.example_inputs, options, loss=loss)
    if out.as_json:
        out.document({"model": model, "optimizer": optimizer, "loss": loss, **found.to_data()})
        return
    _show(out, model, found)


def _show(out: Output, model: str, found: GraphPlan) -> None:
    plan, figures = found.plan, found.plan.figures
    share = figures.repeated_seconds / found.problem.seconds if found.problem.seconds else 0.0
    if not out.quiet:
        names = ("layer", "kept", "compressed", "given up", "repeated", "time again")
        columns = [Column(names[0]), *(Column(n, right=True) for n in names[1:])]
        out.table(columns, [
            [row.layer, memory_size(row.kept_bytes), memory_size(row.squeezed_bytes),
             memory_size(row.dropped_bytes),
             str(row.repeated_calls), milliseconds(1e3 * row.repeated_seconds)]
            for row in found.layers
        ])  # fmt: skip
        out.text()
        out.text(f"{model}: one training step", bold=True)
        for kind, size in found.kinds.items():
            if size:
                out.text(f"  {kind:<20}{memory_size(size)}")
        out.text(f"  {'kept for backward':<20}{memory_size(figures.saved_bytes)}"
                 f" of {memory_size(plan.plain.saved_bytes)}")  # fmt: skip
        out.text(f"  {'peak, planned':<20}{memory_size(figures.peak)} at {figures.peak_call}"
                 f" (plain step: {memory_size(plan.plain.peak)})")  # fmt: skip
        out.text(f"  {'least peak found':<20}{memory_size(plan.least_peak)}"
                 f" (none is below {memory_size(plan.peak_bound)})")  # fmt: skip
        out.text(f"  {'repeated':<20}{milliseconds(1e3 * figures.repeated_seconds)}, {share:.1%} of"
                 f" the step, {found.costs}; none below"
                 f" {milliseconds(1e3 * plan.seconds_bound)}, gap {plan.gap:.1%}")  # fmt: skip
        out.text(f"  {'found':<20}by {plan.solver}, in {seconds(plan.solve_seconds)}")
        for note in plan.notes:
            out.text(f"  note: {note}")
    calls = sum(plan.repeats().values())
    out.text(
        f"{memory_size(figures.peak)} of {memory_size(plan.budget)}: {plural(calls, 'call')} "
        f"repeated, {share:.1%} more time ({found.costs})"
    )
