"""The last screen of a compile: what was gained, what was kept and why, what to do next."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopt.cli._output import Column, Output
from mopt.cli._report_parts import chosen_candidate, number, table, text, texts
from mopt.cli._text import change, disk_size, memory_size, milliseconds, plural, three_digits

_NUMBER = re.compile(r"\d[\d.,]*")
RESULT_COLUMNS = (Column(""), Column("before", right=True), Column("after", right=True),
            Column("change"), Column(""))  # fmt: skip
_OUTSIDE_SHOWN = 3
_COSTLIEST_SHOWN = 3
_REASONS_SHOWN = 5


def show_result(out: Output, report: Mapping[str, Any], folder: Path) -> None:
    """Print the table of a report, the layers that were left alone, and where the artifact is."""
    if not out.quiet:
        out.text()
        out.table(RESULT_COLUMNS, result_rows(report, verbose=bool(out.verbose)))
        out.text()
        for line in remarks(report, verbose=bool(out.verbose)):
            out.text(line)
    out.text(f'Wrote {folder}  (open {folder}/report.html; use it: mopt.load("{folder}"))')


def result_rows(report: Mapping[str, Any], *, verbose: bool = False) -> list[list[str]]:
    """Rows of label, before, after, change and how the numbers were found."""
    before, after = report["baseline"], report["result"]
    rows = [[
        "size", disk_size(before["size_bytes"]), disk_size(after["size_bytes"]),
        change(before["size_bytes"], after["size_bytes"], "smaller", "larger"), "measured",
    ]]  # fmt: skip
    rows += _latency_rows(report)
    old, new = before["peak_bytes"]["measured"], after["peak_bytes"]["measured"]
    if old is not None and new is not None:
        rows.append(["peak memory", memory_size(old), memory_size(new),
                     change(old, new, "lower", "higher"), "measured"])  # fmt: skip
    return rows + _quality_rows(report["quality"], verbose)


def _latency_rows(report: Mapping[str, Any]) -> list[list[str]]:
    before, after = report["baseline"]["latency_ms"], report["result"]["latency_ms"]
    rows = []
    speed = report["speed"]
    if speed is not None:
        rows.append(["latency", milliseconds(before["measured"]), milliseconds(after["measured"]),
                     _faster(speed), _interval(speed)])  # fmt: skip
    if before["estimated"] and after["estimated"]:
        old, new = before["estimated"], after["estimated"]
        how = _how_estimated(report)
        if after["measured"]:
            how += f" (error {100 * (new / after['measured'] - 1):+.0f} %)"
        rows.append(["" if rows else "latency", milliseconds(old), milliseconds(new),
                     change(old, new, "faster", "slower"), how])  # fmt: skip
    eager = speed and speed["eager_ms"]
    if eager:
        rows.append(["  beside PyTorch eager", milliseconds(eager),
                     milliseconds(after["measured"]),
                     change(eager, after["measured"], "faster", "slower"),
                     _eager_spread(speed, after["measured"])])  # fmt: skip
    return rows


def _eager_spread(speed: Mapping[str, Any], milliseconds_now: float) -> str:
    """How far the processes that ran PyTorch agree; nothing of it in old reports."""
    given = speed.get("eager_samples_ms")
    found = [number(value) for value in given] if isinstance(given, list) else []
    ratios = sorted(value / milliseconds_now for value in found if value)
    if len(ratios) < 2:
        return "measured"
    if ratios[0] < 1:
        ratios = sorted(1 / ratio for ratio in ratios) if ratios[-1] < 1 else ratios
    return f"measured ({three_digits(ratios[0])}x to {three_digits(ratios[-1])}x)"


def _how_estimated(report: Mapping[str, Any]) -> str:
    estimates = report.get("estimates")
    result = estimates.get("result") if isinstance(estimates, dict) else None
    level = result.get("level") if isinstance(result, dict) else None
    return "estimated from data sheets" if level == "data-sheet" else "estimated"


def is_different(speed: Mapping[str, Any]) -> bool:
    """Whether the interval of the measured ratio leaves out "equally fast"."""
    return not speed["ratio_low"] <= 1.0 <= speed["ratio_high"]


def _faster(speed: Mapping[str, Any]) -> str:
    if not is_different(speed):
        return "no difference"
    return change(1.0, speed["ratio"], "faster", "slower")


def _interval(speed: Mapping[str, Any]) -> str:
    low, high = speed["ratio_low"], speed["ratio_high"]
    if speed["confidence"] <= 0:
        return f"measured (once, in {plural(speed['pairs'], 'pair')}: not sure)"
    sure = f"{100 * speed['confidence']:.0f} % sure"
    if not is_different(speed):
        return f"measured ({sure}: {100 * (low - 1):+.1f} % to {100 * (high - 1):+.1f} % time)"
    least, most = sorted((1 / low, 1 / high)) if high < 1 else sorted((low, high))
    return f"measured ({sure}: {three_digits(least)}x to {three_digits(most)}x)"


def _quality_rows(quality: Mapping[str, Any], verbose: bool) -> list[list[str]]:
    rows = []
    old, new = quality["baseline"], quality["result"]
    if quality["metric"] is not None and old is not None and new is not None:
        less, more = ("worse", "better") if quality["higher_is_better"] else ("better", "worse")
        rows.append([quality["metric"], f"{old:.4g}", f"{new:.4g}",
                     change(old, new, less, more), "measured"])  # fmt: skip
    if verbose or not rows:
        noise = quality["sqnr_db"]
        said = "identical" if noise is None else f"{noise:.1f} dB SQNR"
        batches = plural(quality["batches"], "batch").replace("batchs", "batches")
        rows.append(["output drift", "", f"cosine {quality['cosine']:.5f}", said,
                     f"measured on {batches}"])  # fmt: skip
    return rows


def remarks(report: Mapping[str, Any], *, verbose: bool = False) -> list[str]:
    """Lines about what a reader of the table would ask next; empty when there is nothing."""
    lines = _notes(report) + _kept_all(report) + _slower(report)
    lines += _unmeasured(report) + _binding(report) + _costliest(report) + _widened(report)
    lines += _zeros(report)
    lines += coverage_lines(report["coverage"]) + _kept(report)
    if verbose:
        lines += _skips(report)
    return [*lines, ""] if lines else []


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What the compile did more cheaply than it would have, to stay within its limits."""
    notes = report.get("notes")
    texts = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    return [f"Limited: {note}" for note in texts]


def _binding(report: Mapping[str, Any]) -> list[str]:
    """Which limits of the budget the choice ran into."""
    choice = table(report.get("choice"))
    if not choice:
        return []
    binding = ", ".join(texts(choice.get("binding"))) or "nothing"
    return [f"Binding: {binding}  (prices: mopt inspect DIR --why budget)"]


def _costliest(report: Mapping[str, Any]) -> list[str]:
    """The layers that lose most: in quality where it was looked at, else of their own values."""
    costs: dict[str, float] = {}
    words: dict[str, str] = {}
    for row in report["layers"]:
        cost = number(chosen_candidate(row).get("loss"))
        if cost is not None and cost > 0:
            costs[row["path"]] = cost
        words[row["path"]] = text(row.get("format"))
    what = "Costliest"
    if not costs:
        what = "Rounded most"
        for step in report["steps"]:
            found = table(table(step.get("stats")).get("weight_error"))
            numbers = {path: number(value) for path, value in found.items()}
            costs.update({path: value for path, value in numbers.items() if value and value > 0})
    most = sorted(costs, key=lambda path: -costs[path])[:_COSTLIEST_SHOWN]
    told = [f"{path or 'top level'} {words.get(path, '')} ({100 * costs[path]:.2g} %)"
            for path in most]  # fmt: skip
    return [f"{what}: {', '.join(told)}"] if told else []


def _kept_all(report: Mapping[str, Any]) -> list[str]:
    choice = report.get("choice")
    why = choice.get("kept_all") if isinstance(choice, dict) else None
    return [f"Nothing was compressed: {why}"] if why else []


def _slower(report: Mapping[str, Any]) -> list[str]:
    speed = report["speed"]
    if speed is None or not is_different(speed) or speed["ratio"] <= 1:
        return []
    return [
        f"Slower than uncompressed: {change(1.0, speed['ratio'], 'faster', 'slower')} on this "
        "machine, measured.",
        "  Use another recipe (mopt recipes list; none is the fastest without compression), leave",
        "  layers out with --set PASS.skip=GLOBS, or keep it if only size matters.",
    ]


def _widened(report: Mapping[str, Any]) -> list[str]:
    layers = [layer for layer in report["layers"] if layer.get("widened")]
    if not layers or report.get("backend", "onnx") != "onnx":
        return []
    are, their = ("is", "its") if len(layers) == 1 else ("are", "their")
    return [
        f"{plural(len(layers), 'layer')} {are} small in the file only: {their} weights become",
        "  floats when the model is loaded, which is the fastest way here. Loading takes up to",
        "  three times their bytes as floats, for a moment.",
    ]


def _unmeasured(report: Mapping[str, Any]) -> list[str]:
    if report["speed"] is not None:
        return []
    why = "parts of the model stay eager" if report["coverage"]["outside"] else "--no-measure"
    estimates = report.get("estimates")
    if isinstance(estimates, dict) and estimates.get("is_this_machine") is False:
        why = f"{report.get('target')} is not this machine"
    return [f"Latency and memory were not measured ({why})"]


def coverage_lines(coverage: Mapping[str, Any]) -> list[str]:
    """What stayed outside, where and why; empty when the whole model was captured."""
    parts = coverage["outside"]
    if not parts:
        return []
    lines = [
        f"Captured {coverage['parameters']:.0%} of parameters and {coverage['flops']:.0%} of "
        "FLOPs; the rest runs in PyTorch as before:"
    ]
    for part in parts[:_OUTSIDE_SHOWN]:
        where = f"  at {part['source']}" if part["source"] else ""
        lines.append(f"  {part['path'] or 'top level'}: {part['reason']}{where}")
    if len(parts) > _OUTSIDE_SHOWN:
        lines.append(f"  and {len(parts) - _OUTSIDE_SHOWN} more, in report.json")
    return lines


def _sparse(report: Mapping[str, Any]) -> dict[str, float]:
    """The share of zeros of every layer that a pass gave zeros, and nothing made smaller."""
    found: dict[str, float] = {}
    for step in report["steps"]:
        zeros = table(table(step.get("stats")).get("zeros_of"))
        shares = {path: number(share) for path, share in zeros.items()}
        found |= {path: share for path, share in shares.items() if share is not None}
    return found


def _zeros(report: Mapping[str, Any]) -> list[str]:
    sparse = _sparse(report)
    if not sparse:
        return []
    few, many = min(sparse.values()), max(sparse.values())
    share = f"{many:.0%}" if f"{few:.0%}" == f"{many:.0%}" else f"{few:.0%} to {many:.0%}"
    return [
        f"{plural(len(sparse), 'layer')} with {share} zeros, stored as floats like the others: no "
        "smaller",
        "  and no faster here; smaller once the file is compressed.",
    ]


def _kept(report: Mapping[str, Any]) -> list[str]:
    layers = report["layers"]
    if not layers or not any(step["numerics"] == "lossy" for step in report["steps"]):
        return []
    sparse = _sparse(report)
    kept = [
        row["path"] for row in layers
        if row["bytes_after"] >= row["bytes_before"] and row["path"] not in sparse
    ]  # fmt: skip
    if not kept:
        return []
    reasons = {skip["site"]: skip["reason"] for step in report["steps"] for skip in step["skipped"]}
    declined = _declined(report)
    other = "" if declined else "no pass of the recipe is for them"
    told = [reasons[path] if path and path in reasons else other for path in kept]
    lines = [*declined, f"Kept as they were: {len(kept)} of {plural(len(layers), 'layer')}"]
    folded = fold_reasons([reason for reason in told if reason])
    lines += [f"  {number} x {reason}" for reason, number in folded[:_REASONS_SHOWN]]
    if len(folded) > _REASONS_SHOWN:
        lines.append(f"  and {len(folded) - _REASONS_SHOWN} more reasons, in report.json")
    return lines


def _declined(report: Mapping[str, Any]) -> list[str]:
    """Why passes that lose quality left the whole model as it was."""
    return [
        f"{step['name']} changed nothing: {skip['reason']}"
        for step in report["steps"]
        for skip in step["skipped"]
        if step["numerics"] == "lossy" and not step.get("changed") and not skip["site"]
    ]


def _skips(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for step in report["steps"]:
        for reason, times in fold_reasons([skip["reason"] for skip in step["skipped"]]):
            lines.append(f"  {step['name']} skipped {times} x {reason}")
    return lines


def fold_reasons(reasons: list[str]) -> list[tuple[str, int]]:
    """Each kind of reason once with its count, most frequent first.

    Reasons that differ only in numbers are one kind, told by its first with "and similar".
    """
    kinds: dict[str, list[str]] = {}
    for reason in reasons:
        kinds.setdefault(_NUMBER.sub("#", reason), []).append(reason)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    return [
        (found[0] + (" (and similar)" if len(set(found)) > 1 else ""), len(found))
        for found in ordered
    ]
