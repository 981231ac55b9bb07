"""Show the report of an artifact: a page for a browser, Markdown, JSON or a trace.

html is one file that needs no network and reads with scripts off; md suits a comment on a pull
request; json is the report itself; trace is the memory plan and the steps for Perfetto or
chrome://tracing.

The page is written beside the artifact, as DIR/report.html, unless -o says otherwise; the other
forms go to standard output.

\b
Examples:
  mopt report out/digits-cnn --open
  mopt report out/digits-cnn --format md >> $GITHUB_STEP_SUMMARY
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from mopt.cli._command import Command
from mopt.cli._output import Output
from mopt.errors import ArtifactError, UsageError

PAGE = "report.html"


@click.command(cls=Command, help=__doc__)
@click.argument("folder", metavar="DIR")
@click.option(
    "--format", "form", type=click.Choice(["html", "md", "json", "trace"]), default="html",
    show_default=True, help="What to make.",
)  # fmt: skip
@click.option("-o", "--output", metavar="FILE", help="Where to write; - is standard output.")
@click.option("--open", "is_opened", is_flag=True, help="Open the page in the browser.")
@click.pass_obj
def command(out: Output, folder: str, form: str, output: str | None, is_opened: bool) -> None:
    if is_opened and (form != "html" or output == "-"):
        raise UsageError("--open needs a page in a file", code="open-what", hint="--format html")
    if out.as_json and form != "html":
        raise UsageError(
            "--json is the answer of the command, --format what it makes",
            code="two-formats",
            hint="--format json alone prints the report",
        )
    content = render(folder, form)
    target = output or (str(Path(folder) / PAGE) if form == "html" else "-")
    if target == "-":
        out.stdout.write(content)
        return
    write_beside(target, content)
    if out.as_json:
        out.document({"report": target, "bytes": len(content.encode())})
    else:
        out.text(f"Wrote {target}")
    if is_opened:
        _open(out, target)


def render(folder: str | Path, form: str) -> str:
    """The report of an artifact in one of the forms.

    Raises ArtifactError for an artifact without a report, or with one that cannot be drawn.
    """
    from mopt.cli._report_html import html_page
    from mopt.cli._report_markdown import markdown_report
    from mopt.cli._report_parts import read_given
    from mopt.cli._report_trace import trace_json

    given = read_given(folder, or_training=form in ("html", "json"))
    if form == "json":
        return json.dumps(given.report, indent=2, sort_keys=True, allow_nan=False) + "\n"
    draw = {"html": html_page, "md": markdown_report, "trace": trace_json}[form]
    try:
        return draw(given)
    except OverflowError as error:
        raise ArtifactError(
            f"report.json: a number is too large to be drawn ({error})",
            code="malformed-report",
            hint="the file is damaged or hostile; compile again, or fetch the artifact again",
        ) from error


def write_beside(target: str, content: str) -> None:
    """Write a file whose name may lie in a stranger's folder: a link there is not followed."""
    from mopt.files import write_file_atomic

    if Path(target).is_symlink():
        raise UsageError(
            f"{target!r} is a link; it is not followed",
            code="output-is-link",
            hint="name another file with -o",
        )
    write_file_atomic(target, content.encode())


def _open(out: Output, target: str) -> None:
    import webbrowser

    address = Path(target).resolve().as_uri()
    if not webbrowser.open(address):
        out.warn(f"no browser was found; open {address}")
