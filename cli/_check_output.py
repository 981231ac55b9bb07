"""What mopt check says: a table, Markdown, JUnit and annotations, from the same rows."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import quoteattr

from mopt.cli._output import Column, Output
from mopt.cli._report_markdown import details, fit, markdown, markdown_table
from mopt.cli._text import disk_size, milliseconds, plural, safe
from mopt.gate import Row, Verdict

_LAYERS_TOLD = 10
# GitHub shows ten annotations of a kind a step.
_ANNOTATIONS = 10
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass
class Checked:
    """What came of one model: rows, or the error that kept it from being compiled."""

    name: str
    rows: list[Row] = field(default_factory=list)
    formats: list[tuple[str, str, str]] = field(default_factory=list)
    outside: Sequence[Mapping[str, Any]] = ()
    error: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def failed(self, fail_on: str) -> int:
        """How many rows fail the gate, with the level from which rows do."""
        if fail_on == "never":
            return 0
        bad = {Verdict.FAIL} | ({Verdict.WARN} if fail_on == "warn" else set())
        return sum(row.verdict in bad for row in self.rows) + bool(self.error)


def amount(metric: str, value: float | None) -> str:
    """A value with its unit."""
    if value is None:
        return ""
    if metric == "size":
        return disk_size(value)
    if metric == "latency-estimated":
        return milliseconds(value)
    if metric in ("latency-measured", "peak-memory"):
        return f"{value:.3g}x of uncompressed"
    return f"{100 * value:.4g} %" if metric == "coverage" else f"{value:.4g}"


def change_of(row: Row) -> str:
    """How much worse (+) or better (-)."""
    if row.change is None or row.limit is None:
        return ""
    if abs(row.change) < 1e-9:
        return "the same"
    unit = "pt" if row.limit.absolute else "%"
    return f"{100 * abs(row.change):.2g} {unit} {'worse' if row.change > 0 else 'better'}"


def limit_of(row: Row) -> str:
    """What is allowed."""
    if row.limit is None:
        return ""
    return f"{100 * row.limit.change:g} {'pt' if row.limit.absolute else '%'} worse"


def show(out: Output, found: Sequence[Checked], *, fail_on: str) -> None:
    """The table: rows that did not pass, and with -v all of them."""
    rows = []
    for model in found:
        for row in model.rows:
            if out.verbose or row.verdict is not Verdict.OK:
                rows.append([
                    model.name, row.metric, amount(row.metric, row.base),
                    amount(row.metric, row.now), change_of(row), limit_of(row),
                    row.verdict.upper() if row.verdict is Verdict.FAIL else row.verdict, row.note,
                ])  # fmt: skip
        passed = sum(row.verdict is Verdict.OK for row in model.rows)
        if passed and not out.verbose:
            rows.append([model.name, plural(passed, "row"), "", "", "", "", "ok", ""])
    if rows and not out.quiet:
        out.table([Column("model"), Column("metric"), Column("baseline", right=True),
                   Column("now", right=True), Column("change"), Column("limit"), Column(""),
                   Column("")], rows)  # fmt: skip
    for model in found:
        if model.error:
            out.text(f"{model.name}: {model.error}")
        for note in model.notes:
            out.text(f"{model.name}: {note}")
        for path, old, new in model.formats[:_LAYERS_TOLD]:
            out.text(
                f"  {model.name} {path or 'top level'}: {old or 'absent'} -> {new or 'absent'}"
            )
        if len(model.formats) > _LAYERS_TOLD:
            out.text(f"  and {len(model.formats) - _LAYERS_TOLD} more layers, with --json")
    out.text(verdict_line(found, fail_on))


def verdict_line(found: Sequence[Checked], fail_on: str) -> str:
    """One line: how many rows failed."""
    failed = sum(model.failed(fail_on) for model in found)
    total = sum(len(model.rows) + bool(model.error) for model in found)
    took = f"{sum(model.seconds for model in found):.0f} s of work"
    if failed:
        bad = sum(bool(model.failed(fail_on)) for model in found)
        return f"{failed} of {plural(total, 'row')} failed in {bad} of " \
               f"{plural(len(found), 'model')} ({took})"  # fmt: skip
    return f"{plural(len(found), 'model')}, {plural(total, 'row')}: passed ({took})"


def as_json(found: Sequence[Checked], fail_on: str) -> dict[str, Any]:
    """Everything, as data."""
    return {
        "passed": not any(model.failed(fail_on) for model in found),
        "failed_rows": sum(model.failed(fail_on) for model in found),
        "models": [
            {
                "name": model.name, "error": model.error or None, "seconds": model.seconds,
                "notes": model.notes,
                "rows": [
                    {"metric": r.metric, "baseline": r.base, "now": r.now, "change": r.change,
                     "limit": r.limit and r.limit.change, "verdict": str(r.verdict),
                     "note": r.note}
                    for r in model.rows
                ],
                "formats": [{"path": p, "baseline": a, "now": b} for p, a, b in model.formats],
            }
            for model in found
        ],
    }  # fmt: skip


def markdown_summary(found: Sequence[Checked], fail_on: str) -> str:
    """For the summary of a CI step, or a comment."""
    head = ["model", "metric", "baseline#", "now#", "change", "limit", "verdict"]

    def lines(rows: Sequence[Row]) -> str:
        return markdown_table(head, [
            [r.model, r.metric, amount(r.metric, r.base), amount(r.metric, r.now), change_of(r),
             limit_of(r), ", ".join(filter(None, (str(r.verdict), r.note)))]
            for r in rows
        ])  # fmt: skip

    everything = [row for model in found for row in model.rows]
    told = [row for row in everything if row.verdict is not Verdict.OK]
    sections = [("verdict", f"### mopt check: {markdown(verdict_line(found, fail_on))}")]
    if told:
        sections.append(("rows", lines(told)))
    for model in found:
        if model.error:
            sections.append(("errors", f"**{markdown(model.name)}**: {markdown(model.error)}"))
        if model.formats:
            body = [[p or "top level", a or "absent", b or "absent"]
                    for p, a, b in model.formats[:_LAYERS_TOLD]]  # fmt: skip
            table = markdown_table(["layer", "baseline", "now"], body)
            said = f"{model.name}: {plural(len(model.formats), 'layer')} with another format"
            sections.append(("layers", details(said, table)))
        if model.notes:
            notes = markdown("; ".join(model.notes))
            sections.append(("notes", f"- **{markdown(model.name)}**: {notes}"))
    if everything:
        sections.append(("all rows", details("All rows", lines(everything))))
    if any(model.failed(fail_on) for model in found):
        accept = "If this is meant: `mopt check --update-baseline`, and commit the baseline."
        sections.append(("accept", accept))
    return fit(sections)


def junit(found: Sequence[Checked], fail_on: str) -> str:
    """JUnit XML: a suite a model, a case a row."""
    suites = []
    for model in found:
        cases = [_case(row, fail_on) for row in model.rows]
        if model.error:
            cases.append('    <testcase classname="compile" name="compile"><error message='
                         f"{_xml(model.error)}/></testcase>")  # fmt: skip
        elif not cases:
            cases = ['    <testcase classname="compile" name="compile"></testcase>']
        skipped = sum(row.verdict in _UNDECIDED for row in model.rows)
        suites.append(
            f"  <testsuite name={_xml(model.name)} tests=\"{len(cases)}\" "
            f'failures="{model.failed(fail_on) - bool(model.error and fail_on != "never")}" '
            f'errors="{int(bool(model.error))}" skipped="{skipped}" '
            f'time="{model.seconds:.3f}">\n' + "\n".join(cases) + "\n  </testsuite>"
        )  # fmt: skip
    return '<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="mopt check">\n' + \
        "\n".join(suites) + "\n</testsuites>\n"  # fmt: skip


_UNDECIDED = (Verdict.SKIPPED, Verdict.NOISY)


def _case(row: Row, fail_on: str) -> str:
    told = ", ".join(filter(None, (
        f"{amount(row.metric, row.base) or 'nothing'} -> {amount(row.metric, row.now)}",
        change_of(row), f"limit {limit_of(row)}", row.note)))  # fmt: skip
    inside = ""
    if Checked(row.model, [row]).failed(fail_on):
        inside = f"<failure message={_xml(told)}/>"
    elif row.verdict in _UNDECIDED:
        inside = f"<skipped message={_xml(told)}/>"
    return f"    <testcase classname={_xml(row.model)} name={_xml(row.metric)}>{inside}</testcase>"


def _xml(text: str) -> str:
    return quoteattr(_NOT_XML.sub("?", safe(text)))


def workflow_commands(found: Sequence[Checked], fail_on: str) -> list[str]:
    """GitHub's workflow commands: failed rows, and the source lines that were not captured."""
    errors, warnings = [], []
    for model in found:
        if model.error:
            errors.append(_command("error", f"{model.name}: {model.error}"))
        for row in model.rows:
            said = f"{model.name}: {row.metric} is {change_of(row)}, limit {limit_of(row)}"
            if Checked(model.name, [row]).failed(fail_on):
                errors.append(_command("error", said))
            elif row.verdict is Verdict.WARN:
                warnings.append(_command("warning", said))
        for part in model.outside:
            place = re.fullmatch(r"(.+):(\d{1,9})", part["source"])
            said = f"{model.name}: {part['path'] or 'top level'} was not captured: {part['reason']}"
            where = {"file": place[1], "line": place[2]} if place else {}
            warnings.append(_command("warning", said, where))
    return errors[:_ANNOTATIONS] + warnings[:_ANNOTATIONS]


def _command(kind: str, message: str, where: Mapping[str, str] | None = None) -> str:
    properties = {"title": "mopt check", **(where or {})}
    told = ",".join(f"{key}={_escaped(value, also=':,')}" for key, value in properties.items())
    return f"::{kind} {told}::{_escaped(message)}"


def _escaped(text: str, also: str = "") -> str:
    shown = safe(text).replace("%", "%25")
    for sign in also:
        shown = shown.replace(sign, f"%{ord(sign):02X}")
    return shown


def in_github() -> bool:
    """Whether a GitHub workflow reads what is printed."""
    return os.environ.get("GITHUB_ACTIONS") == "true"
