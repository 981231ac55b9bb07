"""``mopt plan MODEL``: one arena for everything, or a fast memory and a slow one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopt.cli._output import Column, Output
from mopt.cli._progress import ConsoleProgress
from mopt.cli._text import memory_size, milliseconds, plural
from mopt.disk import check_writable
from mopt.errors import UsageError

if TYPE_CHECKING:
    from mopt.ordered_artifact import OrderTried
    from mopt.program import Program

# Buffers listed of those alive at the peak, and values of those that move most.
_SHOWN = 12


def plan_arena(
    out: Output,
    model: str,
    given: Mapping[str, Any],
    output: str | None,
    time_limit: float,
    seed: int,
) -> None:
    """Plan order and offsets, write the files asked for and show the plan."""
    options = {"seconds": time_limit, "for_device": True}
    if given["onnx"] is not None:
        check_writable(given["onnx"])
    with out.user_code(), ConsoleProgress(out) as progress:
        before, program = _planned(model, given, "plan-memory", options, seed, progress)
        tried = _write_onnx(before, program, given["onnx"], progress) if given["onnx"] else None
    plan = program.plan["memory"]
    _write_files(program, plan, output, given["header"], given["tflm"])
    if out.as_json:
        told = tried and {
            "folder": given["onnx"], "planned_order": tried.kept_plan,
            "written_bytes": tried.written_bytes, "planned_bytes": tried.planned_bytes,
        }  # fmt: skip
        out.document({**plan, "onnx": told} if tried else plan)
        return
    _show(out, model, plan)
    if tried is not None:
        out.text()
        out.text(_onnx_line(tried, given["onnx"]))


def plan_moves(
    out: Output,
    model: str,
    given: Mapping[str, Any],
    output: str | None,
    time_limit: float,
    seed: int,
) -> None:
    """Plan what lies in the fast memory and what moves, write the plan and show it."""
    from mopt.files import write_file_atomic
    from mopt.json_files import json_bytes

    options = {
        "seconds": time_limit, "fast_memory": given["fast_memory"] or "",
        "weights": not given["no_weights"], "minimise": given["minimise"],
    }  # fmt: skip
    with out.user_code(), ConsoleProgress(out) as progress:
        _, program = _planned(model, given, "plan-tiers", options, seed, progress)
    plan = program.plan["tiers"]
    if output is not None:
        write_file_atomic(output, json_bytes(plan))
    if out.as_json:
        out.document(plan)
        return
    _show_moves(out, model, plan)


def _planned(
    model: str,
    given: Mapping[str, Any],
    planner: str,
    options: dict[str, Any],
    seed: int,
    progress: ConsoleProgress,
) -> tuple[Program, Program]:
    """The program before and after the planner."""
    from mopt.device import find_device
    from mopt.driver import BASELINE
    from mopt.frontend import capture
    from mopt.model_source import load_source
    from mopt.pass_base import PassContext
    from mopt.pipeline import Pipeline
    from mopt.recipe import Recipe
    from mopt.registry import make_pass

    device = find_device(given["device"]) if given["device"] else None
    step = make_pass(planner, options)
    progress.stage("Loading", model)
    source = load_source(model, trust=given["trust"], inputs=given["inputs"])
    progress.end(model)
    progress.stage("Capturing", model)
    program = capture(source.model, source.example_inputs, source.dynamic_shapes)
    if not program.coverage.is_whole:
        raise UsageError(
            "parts of this model stay eager, so no plan can hold all of its memory",
            code="plan-of-islands",
            hint="mopt inspect says which parts and why",
        )
    context = PassContext(seed=seed, device=device)
    if planner == "plan-memory" and not given["as_captured"]:
        program = Pipeline(Recipe.load(BASELINE).passes()).run(program, context)
    progress.end(f"{program.name}, {plural(len(program.nodes), 'node')}")
    progress.stage("Planning")
    planned = Pipeline([step]).run(program, context)
    found = planned.plan["memory" if planner == "plan-memory" else "tiers"]
    progress.end(f"{found['seconds']:.3g} s")
    return program, planned


def _write_onnx(
    before: Program, planned: Program, folder: str, progress: ConsoleProgress
) -> OrderTried:
    from mopt.ordered_artifact import lower_in_better_order

    progress.stage("Lowering", "onnx, in both orders")
    tried = lower_in_better_order(before, planned, "onnx")
    tried.artifact.save(folder)
    progress.end("onnx, the planned order" if tried.kept_plan else "onnx, the order as written")
    return tried


def _onnx_line(tried: OrderTried, folder: str) -> str:
    if tried.written_bytes is None or tried.planned_bytes is None:
        return f"Wrote {folder} for ONNX Runtime; the plan moves no call, so nothing was compared"
    kept = "planned order, which helps" if tried.kept_plan else "order as written"
    return (
        f"Wrote {folder} for ONNX Runtime in the {kept}: a process that runs it takes "
        f"{memory_size(tried.planned_bytes)} in the planned order and "
        f"{memory_size(tried.written_bytes)} as written (measured)"
    )


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
    from mopt.memory_moment import fullest_moment

    out.text(model, bold=True)
    peak, before = plan["peak_bytes"], plan["input_order_bytes"]
    rows = [
        ["arena", memory_size(peak), ""],
        ["no plan goes below", memory_size(plan["lower_bound_bytes"]), _gap(plan["gap"])],
        ["results in the order as written", memory_size(before), plan["order_from"]],
    ]
    out.table([Column(""), Column("planned", right=True), Column("")], rows)
    moment = fullest_moment(plan)
    alive = moment.buffers if moment else ()
    out.text()
    fullest = f", {moment.step} ({moment.node})" if moment else ""
    out.text(f"{plural(len(alive), 'buffer')} at the fullest step{fullest}:")
    shown = alive[:_SHOWN]
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


def _show_moves(out: Output, model: str, plan: Mapping[str, Any]) -> None:
    out.text(model, bold=True)
    extra, cache = plan["extra_bytes"], plan["least_recently_used_extra_bytes"]
    proof = "no plan moves fewer"
    if plan["status"] != "optimal":
        proof = f"no plan goes below {memory_size(plan['extra_bound_bytes'])}"
    saved = f"the plan moves {1 - extra / cache:.1%} less" if cache else ""
    times = plan["estimated"]
    rows = [
        [f"fast memory ({plan['fast']})", memory_size(plan["fast_bytes"]),
         f"{memory_size(plan['needs_bytes'])} hold everything"],
        ["compulsory moves", memory_size(plan["compulsory_bytes"]), "weights, inputs, results"],
        ["other moves", memory_size(extra), proof],
        ["of a cache, in the order as written", memory_size(cache), saved],
        ["time, estimated", milliseconds(1e3 * times["seconds"]),
         f"{milliseconds(1e3 * times['compute_seconds'])} of it computing"],
    ]  # fmt: skip
    out.table([Column(""), Column("planned", right=True), Column("")], rows)
    spilled = _spilled(plan)
    if not spilled:
        return
    out.text()
    out.text(f"{plural(len(spilled), 'value')} written out and read again, by bytes:")
    out.table(
        [Column("value"), Column("bytes", right=True), Column("of", right=True),
         Column("made in step", right=True), Column("back in", right=True)],
        spilled[:_SHOWN],
    )  # fmt: skip
    if len(spilled) > _SHOWN:
        out.text(f"and {len(spilled) - _SHOWN} smaller ones")


def _spilled(plan: Mapping[str, Any]) -> list[list[str]]:
    """Values that leave the fast memory though they are no results, the largest parts first."""
    values = {value["id"]: value for value in plan["values"]}
    back: dict[str, int] = {}
    for row in (*plan["stays"], *plan["windows"]):
        at = row.get("at", row.get("lower"))
        made = [s["at"] for s in plan["spills"] if s["value"] == row["value"]]
        if made and at > min(made):
            back[row["value"]] = min(at, back.get(row["value"], at))
    rows = [row for row in plan["spills"] if not values[row["value"]]["kept"]]
    rows.sort(key=lambda row: (-row["bytes"], row["at"]))
    return [
        [row["value"], memory_size(row["bytes"]), memory_size(values[row["value"]]["bytes"]),
         str(row["at"]), str(back.get(row["value"], ""))]
        for row in rows
    ]  # fmt: skip
