"""Make a model smaller and faster, and prove it.

MODEL is zoo:NAME, package.module:factory, path/file.py:factory, saved.pt2 or hf:DIRECTORY. A
factory returns a module, or a dict with model, example_inputs and, if there are any,
dynamic_shapes, calibration and evaluate. mopt runs the code that MODEL names.

The artifact is written to a folder that is complete or absent, also after Ctrl-C.

\b
Examples:
  mopt compile zoo:digits-cnn -r int8-static
  mopt compile net.py:factory --budget 'size<=3MB' --budget 'quality>=0.99'
  mopt compile hf:all-MiniLM-L6-v2 -r int8-dynamic -o out/minilm
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopt.budget import Budget
from mopt.cli._command import Command, option
from mopt.cli._log import NAME as LOG
from mopt.cli._log import Log
from mopt.cli._output import Output
from mopt.cli._progress import ConsoleProgress
from mopt.cli._summary import show_result
from mopt.cli._text import seconds
from mopt.cli.report import PAGE
from mopt.errors import BudgetNotMet, UsageError
from mopt.files import check_target
from mopt.model_source import (
    check_data_reference,
    load_calibration,
    load_evaluate,
    load_source,
    parse_source,
)
from mopt.quantity import read_bytes
from mopt.recipe import Recipe

if TYPE_CHECKING:
    from mopt.lowering import Artifact
    from mopt.model_source import ModelSource
    from mopt.pipeline import Step

_log = logging.getLogger("mopt.compile")
_CALIBRATION_HELP = """Calibration data: module:name or file.py:name of an iterable of inputs (or of
a function that returns one), or FILE.npz. In an npz file arrays are named as the model's inputs;
each holds samples along the first axis (cut into batches as large as the example's), or batches
along one more axis in front, or there is one array a batch, named x.0, x.1 and so on."""


@click.command(cls=Command, help=__doc__)
@click.argument("model")
@option("-t", "--target", default="host", show_default=True, help="Device the result is for.")
@option("-b", "--backend", default="onnx", show_default=True, help="What runs the result.")
@option(
    "-r",
    "--recipe",
    metavar="NAME|FILE.toml",
    help="Which passes run; see mopt recipes list. Default: auto with --budget, else int8-dynamic.",
)
@option(
    "--set",
    "settings",
    multiple=True,
    metavar="PASS.OPTION=VALUE",
    envvar="MOPT_SET",
    help="Change an option of a pass of the recipe; see mopt passes explain. Repeatable.",
)
@option("--calib", metavar="X", help=_CALIBRATION_HELP)
@option(
    "--eval",
    "evaluate",
    metavar="MODULE:FUNCTION",
    envvar="MOPT_EVAL",
    help="Quality metric: called with the model as a callable, returns a number.",
)
@option(
    "--budget",
    multiple=True,
    metavar="LIMIT",
    help="'size<=3MB', 'latency<=0.5x', 'memory<=64MiB', 'quality>=0.99'. Repeatable.",
)
@option("--inputs", metavar="FILE.npz", help="Example inputs, named as the arguments of forward.")
@click.option("-o", "--output", metavar="DIR", help="Where to write; default out/<model name>.")
@click.option("--force", is_flag=True, help="Replace the output if it is an artifact.")
@click.option("--trust", is_flag=True, help="Load a .pt2, which runs code from the file.")
@click.option(
    "--dry-run", is_flag=True, help="Print the recipe that would run, as TOML for -r, and stop."
)
@option(
    "--allow-slower",
    is_flag=True,
    help="Let auto give a result that is slower than the uncompressed model.",
)
@option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@option(
    "--require-coverage",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="SHARE",
    help="Fail unless this share (0 to 1) of parameters and FLOPs can be captured.",
)
@option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads of mopt and of the measured models; default: what the runtimes pick.",
)
@option(
    "--measure/--no-measure",
    default=True,
    envvar="MOPT_MEASURE",
    help="Whether to time the result; on unless told otherwise.",
)
@option(
    "--max-minutes",
    type=click.FloatRange(min=0, min_open=True),
    metavar="M",
    help="Take cheaper paths near this, and stop with what there is after it.",
)
@option(
    "--max-memory",
    metavar="SIZE",
    help="Memory mopt may hold itself, such as 4GiB: it takes cheaper paths, and stops above it.",
)
@click.pass_obj
def command(out: Output, model: str, **options: Any) -> None:  # fmt: skip
    budget = Budget.parse(options["budget"])
    options["max_memory"] = _bytes(options["max_memory"])
    chosen = _recipe(options["recipe"] or budget.default_recipe, options["settings"])
    source_name = parse_source(model)
    for key, what in (("calib", "calibration data"), ("evaluate", "function")):
        if options[key] is not None:
            check_data_reference(options[key], what)
    if options["dry_run"]:
        _print_recipe(out, chosen)
        return
    target = options["output"] or f"out/{source_name.name}"
    check_target(target, options["force"])
    missed: BudgetNotMet | None = None
    with Log(out) as log, out.user_code(), ConsoleProgress(out) as progress:
        progress.stage("Loading", model)
        _check_choices(chosen, options)
        for notice in filter(None, (one.notice(options["backend"]) for one in chosen.passes())):
            out.warn(notice)
        source = _load(out, progress, model, options)
        try:
            artifact = _compile(source, chosen, options, progress, out)
        except BudgetNotMet as error:
            missed, artifact = error, error.artifact
    beside = {LOG: log.text().encode(), PAGE: _page(artifact).encode()}
    folder = artifact.save(target, force=options["force"], beside=beside)
    _show(out, artifact, folder, missed)
    if missed is not None:
        raise missed


def _page(artifact: Artifact) -> str:
    from mopt.cli._report_html import html_page
    from mopt.cli._report_parts import PLAN, Given, read_plan

    assert artifact.report is not None
    has_plan = PLAN in artifact.manifest["files"]
    return html_page(Given(artifact.report.data, read_plan(artifact.folder) if has_plan else None))


def _recipe(name: str, settings: tuple[str, ...]) -> Recipe:
    return Recipe.load(name).with_settings(list(settings))


def _bytes(text: str | None) -> int | None:
    """A size as budgets write it, with its unit, in bytes."""
    if text is None:
        return None
    found = read_bytes(text)
    if not found or not text.strip()[-1].isalpha():
        raise UsageError(
            f"--max-memory is {text!r}, expected a size with its unit",
            code="bad-option",
            hint="for example 2GiB",
        )
    return found


def _print_recipe(out: Output, recipe: Recipe) -> None:
    text = recipe.to_toml(full=True)
    if out.as_json:
        out.document({"recipe": recipe.name, "toml": text})
    else:
        out.text(text.rstrip("\n"))


def _load(
    out: Output, progress: ConsoleProgress, model: str, options: dict[str, Any]
) -> ModelSource:
    if options["threads"]:
        import torch

        torch.set_num_threads(options["threads"])
    source = load_source(model, trust=options["trust"], inputs=options["inputs"])
    if options["calib"] is not None:
        source = replace(source, calibration=load_calibration(options["calib"], source))
    if options["evaluate"] is not None:
        source = replace(source, evaluate=load_evaluate(options["evaluate"]))
    progress.end(model)
    for note in filter(None, (source.trust_note, *source.notes)):
        out.warn(note)
    return source


def _check_choices(recipe: Recipe, options: dict[str, Any]) -> None:
    """Refuse what can be refused before the model is loaded, which may take long."""
    from mopt.driver import find_target

    recipe.passes()
    find_target(options["target"], options["backend"])


def _compile(
    source: ModelSource,
    recipe: Recipe,
    options: dict[str, Any],
    progress: ConsoleProgress,
    out: Output,
) -> Artifact:
    from mopt.driver import Settings, compile

    def tell(step: Step) -> None:
        _log.debug("%s: changed %s, %.3f s", step.name, step.changed, step.seconds)
        for skip in step.skipped:
            _log.debug("%s left %s alone: %s", step.name, skip.site or "the model", skip.reason)
        if out.verbose:
            done = "changed" if step.changed else "unchanged"
            skipped = f", {len(step.skipped)} skipped" if step.skipped else ""
            progress.say(f"  {step.name:<24} {done}{skipped}, {seconds(step.seconds)}")

    return compile(
        source.model,
        source.example_inputs,
        backend=options["backend"],
        target=options["target"],
        recipe=recipe,
        calibration=source.calibration,
        evaluate=source.evaluate,
        budget=options["budget"],
        dynamic_shapes=source.dynamic_shapes,
        seed=options["seed"],
        name=source.name,
        require_coverage=options["require_coverage"],
        allow_slower=options["allow_slower"],
        max_minutes=options["max_minutes"],
        max_memory_bytes=options["max_memory"],
        settings=Settings(measure=options["measure"], threads=options["threads"]),
        progress=progress,
        callbacks=(tell,),
    )


def _show(out: Output, artifact: Artifact, folder: Path, missed: BudgetNotMet | None) -> None:
    assert artifact.report is not None
    if out.as_json:
        out.document({
            "artifact": str(folder),
            "budget_met": missed is None,
            "budget_missed": missed.message if missed else None,
            "report": artifact.report.data,
        })  # fmt: skip
    else:
        show_result(out, artifact.report.data, folder)
