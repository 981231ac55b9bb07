"""Write mopt.toml, the baseline and a workflow that guard a model of yours.

MODEL is what mopt compile takes. At most three questions are asked, none with --yes or where nobody
can answer. Nothing that exists is replaced without --force. The baseline is made by mopt check,
which compiles and measures the model; --no-baseline leaves that for later.

\b
Examples:
  mopt init net.py:factory
  mopt init net.py:factory --yes --budget 'size<=3MB' --no-baseline
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from mopt.cli._command import Command
from mopt.cli._output import Output
from mopt.errors import UsageError

WORKFLOW = ".github/workflows/mopt.yml"
# Pinned by commit: a moved tag of somebody else's action would run in the user's CI.
_WORKFLOW_TEXT = """\
# Fails a pull request that makes a model larger, slower or worse than mopt-baseline.json says.
name: mopt
on:
  pull_request:
  push:
    branches: [main]
permissions:
  contents: read
jobs:
  check:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683 # v4.2.2
        with:
          persist-credentials: false
      - uses: actions/setup-python@a26af69be951a213d495a4c3e4e4022e16d87065 # v5.6.0
        with:
          python-version: "3.12"
      # Your model's requirements, mopt among them: as the path of a wheel or a repository, for
      # the name alone may be somebody else's on a package index.
      - run: pip install -r requirements.txt
      - run: mopt check --junit mopt-junit.xml
"""


@click.command(cls=Command, help=__doc__)
@click.argument("model", required=False)
@click.option("-r", "--recipe", metavar="NAME|FILE.toml", help="Recipe; default as mopt compile.")
@click.option("--budget", multiple=True, metavar="LIMIT", help="As for mopt compile. Repeatable.")
@click.option("-b", "--backend", default="onnx", show_default=True, help="What runs the result.")
@click.option("--workflow/--no-workflow", default=None, help="Write a GitHub workflow.")
@click.option("--baseline/--no-baseline", "with_baseline", default=None,
              help="Compile now, and write the baseline.")  # fmt: skip
@click.option("-y", "--yes", is_flag=True, help="Ask nothing.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    recipe: str | None,
    budget: tuple[str, ...],
    backend: str,
    workflow: bool | None,
    with_baseline: bool | None,
    yes: bool,
    force: bool,
) -> None:
    from mopt.budget import Budget
    from mopt.files import write_file_atomic
    from mopt.gate_config import NAME
    from mopt.model_source import parse_source

    out = ctx.find_object(Output)
    assert out is not None
    asks = not yes and sys.stdin.isatty()
    if model is None:
        if not asks:
            raise UsageError("no model was named", code="no-model", hint="mopt init net.py:factory")
        model = click.prompt("Which model (file.py:factory, zoo:NAME, hf:FOLDER)", err=True)
    source = parse_source(model)
    Budget.parse(budget)
    if workflow is None:
        workflow = not asks or click.confirm("Write a GitHub workflow", default=True, err=True)
    if with_baseline is None:
        with_baseline = not asks or click.confirm("Compile now for the baseline", True, err=True)
    planned = {NAME: config_text(source.name, model, recipe, budget, backend)}
    if workflow:
        planned[WORKFLOW] = _WORKFLOW_TEXT
    for name in planned:
        if Path(name).exists() and not force:
            raise UsageError(
                f"{name!r} exists", code="output-exists", hint="pass --force to replace it"
            )
    for name, text in planned.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_file_atomic(name, text.encode())
    if with_baseline:
        from mopt.cli.check import command as check

        ctx.invoke(check, config=NAME, update_baseline=True)
    if out.as_json:
        return
    out.text(f"Wrote {', '.join(planned)}")
    if not with_baseline:
        out.text("Next: mopt check --update-baseline")
    out.text("Commit these files; mopt check then fails when the model gets worse")


def config_text(
    name: str, model: str, recipe: str | None, budget: tuple[str, ...], backend: str
) -> str:
    """The content of ``mopt.toml`` for one model."""
    lines = [
        "# What `mopt check` compiles and compares with mopt-baseline.json; see docs/ci.md.",
        f"[models.{_quoted(name)}]",
        f"model = {_quoted(model)}",
        f"backend = {_quoted(backend)}",
    ]
    if recipe is not None:
        lines.append(f"recipe = {_quoted(recipe)}")
    if budget:
        lines.append(f"budget = [{', '.join(map(_quoted, budget))}]")
    lines += [
        "",
        "[check.limits]",
        'size = { increase = "1 %" }',
        'latency-measured = { increase = "10 %" }',
        'quality = { decrease = "0.5 %" }',
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML string; JSON's escapes are TOML's."""
    return json.dumps(text)
