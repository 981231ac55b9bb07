"""Plan a training step within a memory budget: what is kept, what is computed again.

MODEL is what mopt compile takes; its example inputs are the batch. The budget is the peak of
forward and backward with weights, inputs and gradients, as bytes (2GiB) or as a share of the
activations (35%). Nothing is trained; use the same budget in
torch.compile(model, backend="mopt", options={"memory_budget": ...}).

Where that is not enough, the loss in pieces and updates right after each gradient are tried, and
what the plan needs is said. Exit code 1 says that no plan within the budget was found.

\b
Examples:
  mopt train-plan zoo:gpt-12x768 --memory 1GiB
  mopt train-plan net.py:factory --memory 50% --optimizer adamw
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopt.cli._command import Command, option
from mopt.cli._output import Column, Output
from mopt.cli._text import memory_size, milliseconds, plural, seconds
from mopt.model_source import load_source, parse_source

if TYPE_CHECKING:
    from mopt.model_source import ModelSource
    from mopt.sharding_plan import ShardingPlan
    from mopt.training import GraphPlan

_WHY = {
    "chunk_loss": "the loss in pieces, so that logits never exist as a whole",
    "update_at_once": "each parameter updated right after its gradient (mopt.fit)",
}
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
@option("--minutes", type=click.FloatRange(min=0, min_open=True), help="The same in minutes.")
@option(
    "--allow", type=click.Choice(["exact", "lossy"]), default="exact", show_default=True,
    help="lossy: values may be kept in fewer bits, gradients are approximate.",
)  # fmt: skip
@option(
    "--lossy-form", default="int8", show_default=True, type=click.Choice(
        ["int8", "int4", "fp8", "rows", "int8-running", "derivative", "fp8-mixed"]
    ), help="How they are kept; see docs/training.md.",
)  # fmt: skip
@option("--offload", metavar="FOLDER", default="", help="Values may wait in a file there; or auto.")
@option("--chunk-loss", is_flag=True, help="The loss in pieces: logits never exist as a whole.")
@option("--update-at-once", is_flag=True, help="Update right after each gradient, which dies.")
@option("--devices", type=click.IntRange(min=1), metavar="N", help="Choose sharding for N devices.")
@option("--device", metavar="DEVICE", default="host", help="Their profile; see mopt devices list.")
@option("--interconnect", metavar="BYTES/S", help="What each sends to the others; such as 450GB/s.")
@option("--script", metavar="FILE", help="Write a program that trains with the sharding there.")
@option("-o", "--output", metavar="FOLDER", help="Write report.json there.")
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
    minutes: float | None,
    devices: int | None,
    device: str,
    interconnect: str | None,
    script: str | None,
    output: str | None,
    trust: bool,
    **chosen: Any,
) -> None:
    parse_source(model)
    from mopt.files import write_file_atomic
    from mopt.json_files import json_bytes
    from mopt.recompute import parse_bytes
    from mopt.report import SCHEMA
    from mopt.training import TrainingOptions
    from mopt.training_plan import plan_with_savings

    parse_bytes(memory, "--memory")
    with out.user_code():
        source = load_source(model, trust=trust)
        count = sum(p.numel() for p in source.model.parameters() if p.requires_grad)
        options = TrainingOptions.of(
            {"memory_budget": memory, "costs": costs, **chosen,
             "seconds": 60 * minutes if minutes else time_limit,
             "other_bytes": count * _STATE[optimizer]}
        )  # fmt: skip
        out.doing = "planning"
        if devices is not None:
            sharding = _sharding(source, memory, devices, device, interconnect, loss,
                                 options.other_bytes, options.seconds)  # fmt: skip
            _show_sharding(out, sharding, model, loss, script)
            return
        found, savings = plan_with_savings(source.model, source.example_inputs, options, loss=loss)
    about = {"model": model, "optimizer": optimizer, "loss": loss, "needs": list(savings)}
    if output is not None:
        document = {"schema": SCHEMA, "training": {**about, **found.report_section()}}
        Path(output).mkdir(parents=True, exist_ok=True)
        write_file_atomic(Path(output) / "report.json", json_bytes(document))
    if out.as_json:
        out.document({**about, **found.to_data()})
        return
    _show(out, model, found, savings)


def _sharding(
    source: ModelSource, memory: str, devices: int, device: str, interconnect: str | None,
    loss: str, state_bytes: int, seconds: float,
) -> ShardingPlan:  # fmt: skip
    from mopt.device import find_device
    from mopt.recompute import parse_bytes
    from mopt.sharding_plan import plan_sharding
    from mopt.training import bytes_per_second

    amount = parse_bytes(memory, "--memory")
    profile = find_device(device)
    if isinstance(amount, float):
        # Of the largest memory that programs manage.
        amount = int(amount * max(t.capacity.basic for t in profile.memory))
    return plan_sharding(
        source.model, source.example_inputs, devices=devices, device=profile, memory=amount,
        state_bytes=state_bytes, loss=loss, seconds=seconds,
        link=None if interconnect is None else bytes_per_second(interconnect),
    )  # fmt: skip


def _show_sharding(
    out: Output, found: ShardingPlan, model: str, loss: str, script: str | None
) -> None:
    from mopt.files import write_file_atomic
    from mopt.sharding_plan import script as program

    if script is not None:
        write_file_atomic(script, program(found, model, loss).encode())
    if out.as_json:
        out.document({"model": model, "loss": loss, **found.to_data()})
        return
    columns = [Column("stage"), *(Column(n, right=True) for n in
               ("each device", "step", "repeated", "sent", "not hidden"))]  # fmt: skip
    out.table(columns, [
        [f"{one.stage}{' (chosen)' if one is found.chosen else ''}", memory_size(one.peak_bytes),
         milliseconds(1e3 * one.seconds),
         milliseconds(1e3 * one.plan.plan.figures.repeated_seconds), memory_size(one.sent_bytes),
         milliseconds(1e3 * one.exposed_seconds)]
        for one in (found.chosen, *found.others)
    ])  # fmt: skip
    for stage, why in found.failed.items():
        out.text(f"stage {stage}: {why}")
    chosen = found.chosen
    out.text(
        f"{plural(found.devices, 'device')} ({found.device}, {memory_size(found.memory)} each): "
        f"ZeRO stage {chosen.stage}, weights {'' if chosen.resharded else 'not '}resharded after "
        f"forward, blocks at {found.share or '100%'} of their activations; "
        f"{milliseconds(1e3 * chosen.seconds)} a step, estimated"
    )


def _show(out: Output, model: str, found: GraphPlan, savings: Sequence[str]) -> None:
    plan, figures = found.plan, found.plan.figures
    share = plan.seconds / found.problem.seconds if found.problem.seconds else 0.0
    if not out.quiet:
        names = ("layer", "kept", "compressed", "offloaded", "given up", "repeated", "time again")
        columns = [Column(names[0]), *(Column(n, right=True) for n in names[1:])]
        out.table(columns, [
            [row.layer, memory_size(row.kept_bytes), memory_size(row.squeezed_bytes),
             memory_size(row.offloaded_bytes), memory_size(row.dropped_bytes),
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
        if plan.settled:
            out.text(f"  {'waited for transfers':<20}{milliseconds(1e3 * plan.stall_seconds)}")
        out.text(f"  {'found':<20}by {plan.solver}, in {seconds(plan.solve_seconds)}")
        for note in plan.notes:
            out.text(f"  note: {note}")
    for name in savings:
        out.text(f"needs {name}=True: {_WHY[name]}")
    calls = sum(plan.repeats().values())
    out.text(
        f"{memory_size(figures.peak)} of {memory_size(plan.budget)}: {plural(calls, 'call')} "
        f"repeated, {share:.1%} more time ({found.costs})"
    )
