"""The report as Markdown, short enough for a comment on a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mopt.cli._report_parts import Given, guesses, repeat_command, text
from mopt.cli._summary import remarks, result_rows
from mopt.cli._text import change, disk_size, plural, safe

# A comment holds 65,536 characters; what is longer is cut by whole sections, and says so.
LARGEST = 60_000
_LAYERS_TOLD = 10
_ACTIVE = {ord(sign): f"&#{ord(sign)};" for sign in "&<>|`@#*_[]~\\$!:"}


def markdown(text_of_others: object) -> str:
    """One line of text that means nothing to Markdown: no HTML, no mention, no link, no column."""
    return safe(text_of_others).translate(_ACTIVE)


def markdown_table(heads: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """A table; heads that end in # are of numbers."""
    marks = ["---:" if head.endswith("#") else "---" for head in heads]
    lines = [[head.rstrip("#") for head in heads], marks]
    lines += [[markdown(cell) for cell in row] for row in body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def details(summary: str, content: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{markdown(summary)}</summary>\n\n{content}\n\n</details>"


def fit(sections: Sequence[tuple[str, str]], largest: int = LARGEST) -> str:
    """Sections of (name, text) joined; those that do not fit any more are named instead."""
    kept: list[str] = []
    dropped: list[str] = []
    room = largest - 400
    for name, content in sections:
        if len(content) + 2 > room:
            dropped.append(name)
        else:
            room -= len(content) + 2
            kept.append(content)
    if dropped:
        kept.append(f"Left out, too long for a comment: {', '.join(dropped)}.")
    return "\n\n".join(kept) + "\n"


def markdown_report(given: Given) -> str:
    """Verdict, table, the layers that changed most, what was not captured, how to repeat it."""
    report = given.report
    head = f"### {markdown(report['model'])}: {markdown(report['recipe'])}"
    numbers = markdown_table(["", "before#", "after#", "change", "found how"], result_rows(report))
    sections = [("title", head), ("numbers", numbers)]
    notes = [note for note in remarks(report) if note]
    if notes:
        sections.append(("notes", "\n".join(f"- {markdown(note.strip())}" for note in notes)))
    sections.append(("layers", _layers(report["layers"])))
    sections.append(("estimates", details("Estimated against measured", _estimates(report))))
    if report["coverage"]["outside"]:
        body = [[p["path"] or "top level", p["reason"], p["source"]]
                for p in report["coverage"]["outside"]]  # fmt: skip
        table = markdown_table(["part", "reason", "source"], body)
        sections.append(("coverage", details("Not captured", table)))
    made = f"mopt {markdown(text(report.get('mopt')))}, `recipe.toml` is in the report"
    command = f"<pre>{markdown(repeat_command(report))}</pre>"
    sections.append(("repeat", details("How to repeat it", f"{command}\n\n{made}")))
    return fit(sections)


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    changed = [row for row in layers if row["bytes_before"] != row["bytes_after"]]
    changed.sort(key=lambda row: row["bytes_after"] - row["bytes_before"])
    if not changed:
        return f"None of {plural(len(layers), 'layer')} changed its size."
    body = [
        [row["path"], row["format"], disk_size(row["bytes_before"]), disk_size(row["bytes_after"]),
         change(row["bytes_before"], row["bytes_after"], "smaller", "larger")]
        for row in changed[:_LAYERS_TOLD]
    ]  # fmt: skip
    said = f"{len(changed)} of {plural(len(layers), 'layer')} changed their size"
    if len(changed) > _LAYERS_TOLD:
        said += f"; the {_LAYERS_TOLD} that saved most"
    table = markdown_table(["layer", "format", "before#", "after#", "change"], body)
    return details(said, table)


def _estimates(report: Mapping[str, Any]) -> str:
    body = [
        [one.what, *("" if v is None else f"{v:,.4g}" for v in (one.estimated, one.measured)),
         "" if one.error is None else f"{100 * one.error:+.1f} %"]
        for one in guesses(report)
    ]  # fmt: skip
    return markdown_table(["bytes or ms", "estimated#", "measured#", "error#"], body)
