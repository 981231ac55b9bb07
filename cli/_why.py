"""Why a layer got its format, and what the budget costs: the answers of mopt inspect --why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mopt.cli._output import Column, Output
from mopt.cli._text import disk_size, milliseconds
from mopt.errors import ArtifactError, UsageError, unknown_name

BUDGET = "budget"
_UNITS = {
    "size": (1e6, "MB"), "memory": (1e6, "MB"), "latency": (1.0, "ms"), "energy": (1.0, "mJ"),
    "loss": (0.01, "%"),
}  # fmt: skip


def show_why(out: Output, report: Mapping[str, Any] | None, what: str) -> None:
    """Explain a layer by its path, or ``budget``.

    Raises UsageError for an artifact without a choice or a layer that it does not have.
    """
    if report is None or not isinstance(report.get("choice"), dict):
        raise UsageError(
            "nothing was chosen for this artifact: its recipe treats all layers alike",
            code="no-choice",
            hint="compile with --budget, or with -r auto",
        )
    rows = {row["path"]: row for row in report["layers"]}
    if what != BUDGET and what not in rows:
        raise unknown_name("layer", what, [*rows, BUDGET], "mopt inspect DIR")
    try:
        data = _budget(report) if what == BUDGET else _layer(report, rows[what])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(
            f"report.json: the choice is malformed ({error!r})",
            code="malformed-report",
            hint="the file is damaged or hostile; compile again, or fetch the artifact again",
        ) from error
    if out.as_json:
        out.document(data)
    elif what == BUDGET:
        _show_budget(out, data)
    else:
        _show_layer(out, data)


def _layer(report: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    candidates = [c for c in row.get("candidates", []) if "reason" not in c]
    refused = [c for c in row.get("candidates", []) if "reason" in c]
    numbers = ("size_bytes", "latency_ms", "loss")
    return {
        "layer": row["path"],
        "kind": row["kind"],
        "shape": list(row["shape"]),
        "source": row["source"],
        "chosen": row.get("option", row["format"]),
        "why": str(row.get("why", "")),
        "runner_up": row.get("runner_up"),
        "group": [str(path) for path in row.get("group", [])],
        "candidates": [
            {"format": str(c["format"]), **{name: float(c[name]) for name in numbers},
             "latency_source": str(c.get("latency_source", "estimated")),
             "loss_source": str(c["loss_source"])}
            for c in candidates
        ],
        "refused": [{"format": str(c["format"]), "reason": str(c["reason"])} for c in refused],
        "prices": _prices(report),
        "minimize": str(report["choice"]["minimize"]),
    }  # fmt: skip


def _prices(report: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in report["prices"].items()}


def _show_layer(out: Output, data: Mapping[str, Any]) -> None:
    shape = " x ".join(str(size) for size in data["shape"])
    out.text(f"{data['layer']}  {data['kind']} {shape}  {data['source']}", bold=True)
    rows = []
    for row in data["candidates"]:
        mark = {data["chosen"]: "chosen", data["runner_up"]: "runner-up"}.get(row["format"], "")
        rows.append([
            mark, row["format"], disk_size(int(row["size_bytes"])),
            f"{milliseconds(row['latency_ms'])} {row['latency_source']}",
            f"{100 * row['loss']:.3g} % {'measured' if row['loss_source'] == 'exact' else 'est.'}",
        ])  # fmt: skip
    rows.sort(key=lambda row: ("chosen", "runner-up", "").index(row[0]))
    if rows:
        columns = [Column(""), Column("format"), Column("size", right=True),
                   Column("time", right=True), Column("quality cost", right=True)]  # fmt: skip
        out.table(columns, rows)
    for row in data["refused"]:
        out.text(f"refused  {row['format']}: {row['reason']}")
    if data["why"]:
        out.text(f"why      {data['why']}")
    others = [path for path in data["group"] if path != data["layer"]]
    if others:
        out.text(f"agrees   with {', '.join(others)}: one choice for all of them")
    for line in _price_lines(data["prices"], data["minimize"]):
        out.text(line)


def _price_lines(prices: Mapping[str, float], minimize: str) -> list[str]:
    target_unit, target = _UNITS.get(minimize, (1.0, minimize))
    lines = []
    for name, price in prices.items():
        unit, word = _UNITS.get(name, (1.0, ""))
        if price > 0:
            lines.append(
                f"price    {word} more of {name} would take {price * unit / target_unit:.3g} "
                f"{target} off the {minimize} (estimated)"
            )
    return lines


def _budget(report: Mapping[str, Any]) -> dict[str, Any]:
    choice = report["choice"]
    return {
        "budget": [str(text) for text in report["budget"]],
        "minimize": str(choice["minimize"]),
        "status": str(choice["status"]),
        "gap": choice["gap"],
        "binding": [str(name) for name in choice["binding"]],
        "prices": _prices(report),
        "estimate_error": {
            str(name): float(value) for name, value in report["estimate_error"].items()
        },
        "rounds": [
            {
                "estimated": {str(k): v and float(v) for k, v in one["estimated"].items()},
                "measured": {str(k): v and float(v) for k, v in one["measured"].items()},
                "missed": [str(text) for text in one["missed"]],
                "slower": bool(one["slower"]),
            }
            for one in report["rounds"]
        ],
        "kept_all": choice.get("kept_all"),
        "widths": [
            {"path": str(one["path"]), "kind": str(one["kind"]), "kept": int(one["kept"]),
             "of": int(one["of"]), "chosen": str(one["chosen"])}
            for one in choice.get("widths", [])
        ],
    }  # fmt: skip


def _show_budget(out: Output, data: Mapping[str, Any]) -> None:
    out.text(f"{', '.join(data['budget']) or 'no budget'}; least {data['minimize']}", bold=True)
    gap = f", within {100 * data['gap']:.2g} %" if data["gap"] else ""
    out.text(f"solved   {data['status']}{gap}")
    out.text(f"binding  {', '.join(data['binding']) or 'nothing'}")
    for line in _price_lines(data["prices"], data["minimize"]):
        out.text(line)
    rows = []
    for number, one in enumerate(data["rounds"], 1):
        for name, value in one["measured"].items():
            guess = one["estimated"].get(name)
            rows.append([
                f"round {number}", name, _amount(name, guess), _amount(name, value),
                f"{100 * (guess / value - 1):+.1f} %" if guess is not None and value else "",
            ])  # fmt: skip
    if rows:
        out.table([Column(""), Column(""), Column("estimated", right=True),
                   Column("measured", right=True), Column("error", right=True)], rows)  # fmt: skip
    for number, one in enumerate(data["rounds"], 1):
        for text in one["missed"]:
            out.text(f"round {number} missed {text}")
        if one["slower"]:
            out.text(f"round {number} was slower than uncompressed, measured")
    for one in data["widths"]:
        if one["kept"] < one["of"]:
            out.text(f"narrower {one['path']}: {one['kept']} of {one['of']} {one['kind']} kept")
    if data["kept_all"]:
        out.text(f"kept all {data['kept_all']}")


def _amount(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in ("size", "memory"):
        return disk_size(int(value))
    if name == "energy":
        return f"{value:.3g} mJ"
    return milliseconds(value) if name == "latency" else f"{100 * value:.3g} %"
