"""Compile what mopt.toml names, and fail if a model got worse than its committed baseline.

Sizes, estimates, quality and coverage are compared with mopt-baseline.json; measured times as
ratios to the uncompressed model of the same run, so that a slow machine fails nobody. The code
that mopt.toml names is run.

Exit code 0: passed, 1: a limit is not kept, 2: nothing could be compared.

\b
Examples:
  mopt check
  mopt check --update-baseline          # accept the present numbers; commit the file
  mopt check --smoke                    # does every recipe still run? seconds, no numbers
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopt import __version__
from mopt.cli import _check_output as told
from mopt.cli._check_output import Checked
from mopt.cli._command import Command, option
from mopt.cli._output import Output
from mopt.cli._progress import ConsoleProgress
from mopt.cli._smoke_children import check_in_children, usual_jobs
from mopt.errors import BudgetNotMet, InputError, MoptError, UsageError, unknown_name
from mopt.gate import baseline_data, changed_formats, compare, entry_of, read_baseline, updated
from mopt.gate_config import NAME, GateConfig, GateModel, read_config

if TYPE_CHECKING:
    from mopt.lowering import Artifact


@click.command(cls=Command, help=__doc__)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@option("--config", default=NAME, show_default=True, metavar="FILE", help="What to compile.")
@click.option("--baseline", metavar="FILE", help="The numbers to compare with.")
@click.option("--update-baseline", is_flag=True, help="Write the present numbers, and pass.")
@click.option("--smoke", is_flag=True, help="Every model made small, nothing is measured.")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1, 64),
    metavar="N",
    help="With --smoke: models at a time; otherwise as many as cores, up to 4.",
)
@click.option("--measure/--no-measure", default=True, help="Whether to time the models.")
@click.option("--junit", metavar="FILE", help="Write JUnit XML.")
@click.option("--markdown", metavar="FILE", help="Write the summary as Markdown.")
@click.option("-o", "--output", metavar="DIR", help="Keep the artifacts below this folder.")
@click.option("--exit-zero", is_flag=True, help="Report, but do not fail.")
@click.pass_obj
def command(out: Output, models: tuple[str, ...], **options: Any) -> None:
    config = read_config(options["config"])
    chosen = _chosen(config, models)
    path = Path(options["baseline"] or config.folder / config.baseline).absolute()
    base = _read(path, required=options["baseline"] is not None and not options["update_baseline"])
    outputs = {key: Path(options[key]).absolute() if options[key] else None
               for key in ("junit", "markdown", "output")}  # fmt: skip
    found: list[Checked] = []
    entries = dict(base)
    jobs = _jobs(options, len(chosen))
    if jobs > 1:
        names = [model.name for model in chosen]
        where = Path(options["config"]).absolute()
        found = check_in_children(names, where, outputs["output"], jobs)
        chosen = []  # nothing is left to be done here
    with chdir(config.folder):
        for model in chosen:
            checked, entry = _check(out, model, base.get(model.name), options, outputs["output"])
            found.append(checked)
            if entry is not None:
                entries[model.name] = updated(base.get(model.name), entry, checked.rows)
    if not models and not options["smoke"]:
        known = {model.name for model in config.models}
        gone = sorted(set(base) - known)
        entries = {name: entry for name, entry in entries.items() if name in known}
        if not options["update_baseline"]:
            found += [Checked(n, error=f"in the baseline but not in {NAME}") for n in gone]
    _write(out, found, config.fail_on, outputs)
    if options["update_baseline"] and not options["smoke"]:
        _update(out, path, entries, found)
        return
    failed = sum(model.failed(config.fail_on) for model in found)
    if failed and not options["exit_zero"]:
        raise BudgetNotMet(
            told.verdict_line(found, config.fail_on),
            code="gate-failed",
            hint="mend what the rows name"
            if options["smoke"]
            else f"if this is meant, run mopt check --update-baseline and commit {path.name}",
        )


def _chosen(config: GateConfig, names: tuple[str, ...]) -> list[GateModel]:
    known = {model.name: model for model in config.models}
    for name in names:
        if name not in known:
            raise unknown_name("gate model", name, known, "mopt check --help")
    return [known[name] for name in names] if names else list(config.models)


def _jobs(options: dict[str, Any], models: int) -> int:
    """How many models are compiled at a time: measuring takes the whole machine for one."""
    if options["smoke"]:
        return min(options["jobs"] or usual_jobs(), models)
    if options["jobs"] is not None:
        raise UsageError(
            "--jobs is for --smoke: models that are measured take turns", code="jobs-without-smoke"
        )
    return 1


def _read(path: Path, *, required: bool) -> dict[str, dict[str, Any]]:
    from mopt.json_files import read_json

    if not path.exists():
        if required:
            raise InputError(f"no baseline {str(path)!r}", code="no-baseline",
                             hint="mopt check --update-baseline writes one")  # fmt: skip
        return {}
    return read_baseline(read_json(path), path.name)


def _check(
    out: Output, model: GateModel, base: dict[str, Any] | None, options: dict[str, Any],
    keep: Path | None,
) -> tuple[Checked, dict[str, Any] | None]:  # fmt: skip
    """Compile and compare one model; its entry for the baseline unless it could not be made."""
    started = time.monotonic()
    checked = Checked(model.name)
    smoke = options["smoke"]
    try:
        artifact = _compile(out, model, checked, smoke, options["measure"] and not smoke)
    except MoptError as error:
        checked.error = f"error[{error.code}]: {error.message}"
        checked.seconds = time.monotonic() - started
        return checked, None
    if keep is not None:
        artifact.save(keep / model.name, force=True)
    checked.seconds = time.monotonic() - started
    if smoke:
        return checked, None
    assert artifact.report is not None
    entry = entry_of(artifact.report.data)
    checked.rows = compare(model.name, base, entry, model.limits)
    checked.formats = changed_formats(base, entry)
    checked.outside = artifact.report.data["coverage"]["outside"]
    return checked, entry


def _compile(
    out: Output, model: GateModel, checked: Checked, smoke: bool, measure: bool
) -> Artifact:
    from mopt.driver import Settings, compile
    from mopt.model_source import load_calibration, load_evaluate, load_source

    with _quiet(out), out.user_code(), ConsoleProgress(out) as progress:
        progress.stage("Loading", model.name)
        source = load_source(model.model)
        if model.calib is not None:
            source = replace(source, calibration=load_calibration(model.calib, source))
        if model.eval is not None:
            source = replace(source, evaluate=load_evaluate(model.eval))
        progress.end(model.model)
        if smoke:
            from mopt.gate_smoke import shrunk

            source, note = shrunk(source)
            checked.notes.append(f"compiled and checked, nothing measured ({note})")
        try:
            return compile(
                source.model,
                source.example_inputs,
                backend=model.backend,
                target=model.target,
                recipe=model.recipe,
                calibration=source.calibration,
                evaluate=None if smoke else source.evaluate,
                budget=None if smoke else model.budget,
                dynamic_shapes=source.dynamic_shapes,
                seed=model.seed,
                name=source.name,
                settings=Settings(measure=measure, uncompressed_beside=not smoke),
                progress=progress,
            )
        except BudgetNotMet as missed:
            checked.error = missed.message
            best: Artifact = missed.artifact
            return best


@contextmanager
def _quiet(out: Output) -> Iterator[None]:
    """Stages of every model only with -v: the gate's own lines are the answer."""
    was = out.quiet
    out.quiet = was or not out.verbose
    try:
        yield
    finally:
        out.quiet = was


def _write(
    out: Output, found: list[Checked], fail_on: str, outputs: dict[str, Path | None]
) -> None:
    from mopt.files import write_file_atomic

    if out.as_json:
        out.document(told.as_json(found, fail_on))
    else:
        told.show(out, found, fail_on=fail_on)
    if told.in_github():
        for line in told.workflow_commands(found, fail_on):
            out.stderr.write(line + "\n")
    summary = told.markdown_summary(found, fail_on)
    if outputs["junit"] is not None:
        write_file_atomic(outputs["junit"], told.junit(found, fail_on).encode())
    if outputs["markdown"] is not None:
        write_file_atomic(outputs["markdown"], summary.encode())
    step = os.environ.get("GITHUB_STEP_SUMMARY")
    if step:
        with Path(step).open("a", encoding="utf-8") as file:  # others write there too
            file.write(summary)


def _update(out: Output, path: Path, entries: dict[str, Any], found: list[Checked]) -> None:
    from mopt.files import write_file_atomic
    from mopt.json_files import json_bytes

    broken = [model for model in found if model.error]
    if broken:
        raise InputError(
            f"the baseline was not written: {broken[0].name}: {broken[0].error}",
            code="gate-model-failed",
            hint="mend the model, or its budget",
        )
    write_file_atomic(path, json_bytes(baseline_data(entries, __version__)))
    out.note(f"Wrote {path}; commit it")
