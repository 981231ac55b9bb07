"""Plan the memory of a model: order of its calls, offset of every result, proof of how good it is.

MODEL is as mopt compile takes it; its code is run and it is captured. The plan is for a device that
keeps inputs, outputs and everything between in one arena and needs no workspace, at the sizes of
the example inputs. What an artifact of the eager backend needs when it runs is planned by
mopt compile --backend eager --recipe least-memory.

\b
Examples:
  mopt plan-model zoo:unet2d
  mopt plan-model my_model:build -o plan.json --header plan.h
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopt.cli._command import Command, option
from mopt.cli._output import Column, Output
from mopt.cli._progress import ConsoleProgress
from mopt.cli._text import memory_size, plural
from mopt.errors import UsageError

if TYPE_CHECKING:
    from mopt.program import Program

# Buffers listed of those alive at the peak.
_SHOWN = 12


@click.command(cls=Command, help=__doc__)
@click.argument("model", metavar="MODEL")
@option("--inputs", metavar="FILE.npz", help="Example inputs of a model.")
@click.option("--trust", is_flag=True, help="Load a .pt2, which runs code from the file.")
@click.option("-o", "--output", metavar="FILE.json", help="Where the whole plan goes.")
@click.option("--header", metavar="FILE.h", help="Where a C header with all buffers goes.")
@click.option(
    "--tflm", metavar="FILE.bin", help="Where offsets for TensorFlow Lite Micro go, one a node."
)
@option("--seconds", type=click.FloatRange(min=0.1), default=30.0, help="Time for the search.")
@click.pass_obj
def command(
    out: Output,
    model: str,
    inputs: str | None,
    trust: bool,
    output: str | None,
    header: str | None,
    tflm: str | None,
    seconds: float,
) -> None:
    with out.user_code(), ConsoleProgress(out) as progress:
        program = _planned(model, inputs, trust, seconds, progress)
    plan = program.plan["memory"]
    _write_files(program, plan, output, header, tflm)
    if out.as_json:
        out.document(plan)
        return
    _show(out, model, plan)


def _planned(
    model: str, inputs: str | None, trust: bool, seconds: float, progress: ConsoleProgress
) -> Program:
    from mopt.frontend import capture
    from mopt.model_source import load_source
    from mopt.pipeline import Pipeline
    from mopt.registry import make_pass

    progress.stage("Loading", model)
    source = load_source(model, trust=trust, inputs=inputs)
    progress.end(model)
    progress.stage("Capturing", model)
    program = capture(source.model, source.example_inputs, source.dynamic_shapes)
    if not program.coverage.is_whole:
        raise UsageError(
            "parts of this model stay eager, so no plan can hold all of its memory",
            code="plan-of-islands",
            hint="mopt inspect says which parts and why",
        )
    progress.end(f"{program.name}, {plural(len(program.nodes), 'node')}")
    progress.stage("Planning")
    planner = make_pass("plan-memory", {"seconds": seconds, "for_device": True})
    planned = Pipeline([planner]).run(program)
    progress.end(f"{planned.plan['memory']['seconds']:.3g} s")
    return planned


def _write_files(
    program: Program, plan: dict[str, Any], output: str | None, header: str | None, tflm: str | None
) -> None:
    from mopt.files import write_file_atomic
    from mopt.json_files import json_bytes
    from mopt.memory_files import c_header, plan_offsets, tflm_metadata

    if output is not None:
        write_file_atomic(output, json_bytes(plan))
    if header is not None:
        write_file_atomic(header, c_header(plan, Path(header).stem).encode())
    if tflm is not None:
        names = [node.name for node in program.nodes if node.op != "output"]
        write_file_atomic(tflm, tflm_metadata(plan_offsets(plan, names)))


def _show(out: Output, model: str, plan: dict[str, Any]) -> None:
    out.text(model, bold=True)
    peak, before = plan["peak_bytes"], plan["input_order_bytes"]
    rows = [
        ["arena", memory_size(peak), ""],
        ["no plan goes below", memory_size(plan["lower_bound_bytes"]), _gap(plan["gap"])],
        ["results in the order as written", memory_size(before), plan["order_from"]],
    ]
    out.table([Column(""), Column("planned", right=True), Column("")], rows)
    alive = _at_the_peak(plan)
    out.text()
    out.text(f"{plural(len(alive), 'buffer')} at the fullest step:")
    shown = sorted(alive, key=lambda row: (-row["bytes"], row["offset"]))[:_SHOWN]
    out.table(
        [Column("made by"), Column("bytes", right=True), Column("offset", right=True),
         Column("steps", right=True)],
        [[row["id"], memory_size(row["bytes"]), str(row["offset"]),
          f"{row['lower']}-{row['upper'] - 1}"] for row in shown],
    )  # fmt: skip
    if len(alive) > _SHOWN:
        out.text(f"and {len(alive) - _SHOWN} smaller ones")
    if plan["dynamic"]:
        out.text("Sizes are those of the example inputs; other sizes need a plan of their own.")


def _gap(gap: float) -> str:
    return "reached" if gap == 0 else f"{100 * gap:.2g} % above it"


def _at_the_peak(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The buffers alive at the step with most bytes, memory that is taken over once."""
    buffers = [row for row in plan["buffers"] if row["bytes"]]
    best: list[dict[str, Any]] = []
    for step in range(len(plan["steps"])):
        alive = {row["offset"]: row for row in buffers if row["lower"] <= step < row["upper"]}
        if sum(r["bytes"] for r in alive.values()) > sum(r["bytes"] for r in best):
            best = list(alive.values())
    return best
