"""Compare two artifacts, layer by layer.

A is the older or the reference, B the newer. Only their reports are read. Measured times are put
side by side as ratios to the uncompressed model of their own run, because milliseconds of two runs
do not compare; on different machines they are not compared at all.

\b
Examples:
  mopt diff out/int8 out/int4
  mopt diff out/old out/new --json
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from mopt.cli._command import Command
from mopt.cli._output import Column, Output
from mopt.cli._report_parts import number, read_given, table, text
from mopt.cli._text import change, disk_size, memory_size, milliseconds, plural


@click.command(cls=Command, help=__doc__)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.pass_obj
def command(out: Output, first: str, second: str) -> None:
    old, new = read_given(first).report, read_given(second).report
    data: dict[str, Any] = {
        "a": first,
        "b": second,
        "models": [old["model"], new["model"]],
        "machines_differ": _machines_differ(old, new),
        "rows": _rows(old, new),
        "layers": _layers(old, new),
    }
    if out.as_json:
        out.document(data)
        return
    if old["model"] != new["model"]:
        out.warn(f"these are two models, {old['model']!r} and {new['model']!r}")
    shown = [[row["what"], row["shown_a"], row["shown_b"], row["change"], row["source"]]
             for row in data["rows"]]  # fmt: skip
    heads = [Column(""), Column("A", right=True), Column("B", right=True), Column("change"),
             Column("")]  # fmt: skip
    if not out.quiet:
        out.table(heads, shown)
        out.text()
        _show_layers(out, data["layers"])
    same = data["layers"]["same"]
    differ = len(data["layers"]["changed"])
    out.text(f"{plural(differ, 'layer')} differ, {same} are the same")


def _show_layers(out: Output, layers: Mapping[str, Any]) -> None:
    rows = []
    for row in layers["changed"]:
        formats = [row[side]["format"] if row[side] else "absent" for side in "ab"]
        sizes = [disk_size(row[side]["bytes"]) if row[side] else "" for side in "ab"]
        note = row["why"]
        if row["a"] and row["b"]:
            gain = change(row["a"]["bytes"], row["b"]["bytes"], "smaller", "larger")
            note = ", ".join(filter(None, (gain, note)))
        rows.append([row["path"] or "top level", *formats, *sizes, note])
    if rows:
        out.table([Column("layer"), Column("format A"), Column("format B"),
                   Column("bytes A", right=True), Column("bytes B", right=True), Column("")],
                  rows)  # fmt: skip
        out.text()


def _rows(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    a, b = old["result"], new["result"]
    rows = [_row("size", [a["size_bytes"], b["size_bytes"]], disk_size, "smaller", "measured")]
    speeds = [report["speed"] for report in (old, new)]
    if all(speeds):
        ratios = [speed["ratio"] for speed in speeds]
        row = _row("latency, of uncompressed", ratios, lambda r: f"{r:.2f}x", "faster", "measured")
        low = speeds[1]["ratio_low"] / speeds[0]["ratio_high"]
        high = speeds[1]["ratio_high"] / speeds[0]["ratio_low"]
        differ = _machines_differ(old, new)
        if differ:
            row["change"] = f"not comparable: {differ[0]}"
        elif low <= 1 <= high:
            row["change"] = f"no difference ({100 * (low - 1):+.1f} % to {100 * (high - 1):+.1f} %)"
        rows.append(row)
    for key, what, show, less in (
        ("latency_ms", "latency", milliseconds, "faster"),
        ("peak_bytes", "peak memory", memory_size, "lower"),
    ):
        values = [side[key]["estimated"] for side in (a, b)]
        if None not in values:
            rows.append(_row(what, values, show, less, "estimated"))
    qualities = [report["quality"] for report in (old, new)]
    if qualities[0]["metric"] is not None and qualities[0]["metric"] == qualities[1]["metric"]:
        values = [quality["result"] for quality in qualities]
        if None not in values:
            less = "worse" if qualities[0]["higher_is_better"] else "better"
            shown = _row(qualities[0]["metric"], values, lambda v: f"{v:.4g}", less, "measured")
            rows.append(shown)
    drifts = [quality["sqnr_db"] for quality in qualities]
    said = ["identical" if d is None else f"{d:.1f} dB SQNR" for d in drifts]
    rows.append({"what": "output drift", "a": drifts[0], "b": drifts[1], "shown_a": said[0],
                 "shown_b": said[1], "change": "", "source": "measured"})  # fmt: skip
    return rows


def _row(
    what: str, pair: Sequence[float], show: Callable[[float], str], less: str, source: str
) -> dict[str, Any]:
    a, b = pair
    more = {"smaller": "larger", "faster": "slower", "lower": "higher", "worse": "better",
            "better": "worse"}[less]  # fmt: skip
    return {"what": what, "a": a, "b": b, "shown_a": show(a), "shown_b": show(b),
            "change": change(a, b, less, more), "source": source}  # fmt: skip


def _layers(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Layers that got another format or size, or are in one of the two only."""
    sides = [{row["path"]: row for row in report["layers"]} for report in (old, new)]
    changed, same = [], 0
    for path in dict.fromkeys([*sides[0], *sides[1]]):
        found = [side.get(path) for side in sides]
        told = [
            row and {"format": row["format"], "bytes": row["bytes_after"],
                     "latency_ms": number(row.get("latency_ms"))}
            for row in found
        ]  # fmt: skip
        if told[0] == told[1]:
            same += 1
            continue
        why = text(found[1].get("why")) if found[1] else ""
        changed.append({"path": path, "a": told[0], "b": told[1], "why": why})
    return {"changed": changed, "same": same}


def _machines_differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    from mopt.machine import machine_differences

    machines = [table(table(r.get("environment")).get("machine")) for r in (old, new)]
    return machine_differences(*machines)
