"""The gate: the numbers of a compile against those that were committed, row by row.

Sizes, estimates, quality and coverage are compared as numbers with a tolerance. A measured time is
never compared in milliseconds: its row is the ratio to the uncompressed model of the same run, with
its interval, and it is compared with a stored ratio only on the machine that the ratio is from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mopt.errors import InputError
from mopt.machine import machine_differences

SCHEMA = 1
ERROR, WARN, OFF = "error", "warn", "off"


class Verdict(StrEnum):
    """What came of one row. WARN, NOISY, NEW and SKIPPED do not fail a gate."""

    OK = "ok"
    FAIL = "fail"
    WARN = "warn"
    NOISY = "noisy"
    NEW = "new"
    SKIPPED = "not comparable"


@dataclass(frozen=True)
class Limit:
    """How much a metric may get worse: a share of the baseline, or points when ``absolute``."""

    change: float
    level: str = ERROR
    absolute: bool = False


@dataclass(frozen=True)
class Row:
    """One metric of one model. ``change`` is positive for worse, None where nothing compares."""

    model: str
    metric: str
    base: float | None
    now: float | None
    change: float | None
    limit: Limit | None
    verdict: Verdict
    note: str = ""


# Which of the metrics is better when it is more.
_MORE_IS_BETTER = {"coverage"}
DEFAULT_LIMITS = {
    "size": Limit(0.01),
    "latency-estimated": Limit(0.03),
    "latency-measured": Limit(0.10),
    "peak-memory": Limit(0.10),
    "quality": Limit(0.005),
    "coverage": Limit(0.005, WARN, absolute=True),
}


def entry_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a baseline keeps of a report."""
    before, after, speed = report["baseline"], report["result"], report["speed"]
    quality, coverage = report["quality"], report["coverage"]
    rows: dict[str, float] = {
        "size": after["size_bytes"],
        "coverage": min(coverage["parameters"], coverage["flops"]),
    }
    if after["latency_ms"]["estimated"] is not None:
        rows["latency-estimated"] = after["latency_ms"]["estimated"]
    if speed is not None:
        rows["latency-measured"] = speed["ratio"]
    peaks = [side["peak_bytes"]["measured"] for side in (before, after)]
    if None not in peaks and peaks[0] > 0:
        rows["peak-memory"] = peaks[1] / peaks[0]
    if quality["metric"] is not None:
        rows["quality"] = quality["result"]
    else:
        rows["quality"] = quality["cosine"]
    return {
        "rows": rows,
        "quality_metric": quality["metric"] or "cosine",
        "higher_is_better": quality["metric"] is None or quality["higher_is_better"],
        "interval": [speed["ratio_low"], speed["ratio_high"]] if speed is not None else None,
        "recipe": report["recipe"],
        "machine": report["environment"]["machine"],
        "formats": {row["path"]: row["format"] for row in report["layers"]},
    }


def compare(
    model: str,
    base: Mapping[str, Any] | None,
    now: Mapping[str, Any],
    limits: Mapping[str, Limit] | None = None,
) -> list[Row]:
    """The rows of one model; both entries are as :func:`entry_of` gives them, ``base`` checked."""
    limits = {**DEFAULT_LIMITS, **(limits or {})}
    rows = []
    known = base["rows"] if base else {}
    for metric in DEFAULT_LIMITS:
        limit = limits[metric]
        if limit.level == OFF:
            continue
        value, old = now["rows"].get(metric), known.get(metric)
        if value is None and old is None:
            continue
        rows.append(_judged(model, metric, limit, base, now))
    return rows


def _judged(
    model: str, metric: str, limit: Limit, base: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> Row:
    value = now["rows"].get(metric)
    old = base["rows"].get(metric) if base else None
    bad = Verdict.FAIL if limit.level == ERROR else Verdict.WARN

    def row(verdict: Verdict, change: float | None = None, note: str = "") -> Row:
        return Row(model, metric, old, value, change, limit, verdict, note)

    if metric == "latency-measured":
        return _judged_time(row, limit, bad, base, now)
    if value is None:
        return row(Verdict.SKIPPED, note="not found in this run")
    if base is None or old is None:
        return row(Verdict.NEW)
    reason = _other_machine(metric, base, now) or _other_metric(metric, base, now)
    if reason:
        return row(Verdict.SKIPPED, note=reason)
    worse = old - value if _more_is_better(metric, now) else value - old
    change = worse if limit.absolute else _share(worse, old)
    return row(bad if change > limit.change else Verdict.OK, change)


def _judged_time(
    row: Any, limit: Limit, bad: Verdict, base: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> Row:
    """By the interval: worse only if its lower end is, noisy if it is too wide to tell."""
    interval = now["interval"]
    if interval is None:
        return row(Verdict.SKIPPED, note="not measured in this run")
    low, high = interval
    if base is None or "latency-measured" not in base["rows"]:
        if low > 1:
            return row(bad, low - 1, "slower than uncompressed")
        return row(Verdict.NEW)
    reason = _other_machine("latency-measured", base, now)
    if reason:
        if low > 1 and base["rows"]["latency-measured"] <= 1:
            return row(bad, low - 1, "slower than uncompressed")
        return row(Verdict.SKIPPED, note=reason)
    old = base["rows"]["latency-measured"]
    change = _share(now["rows"]["latency-measured"] - old, old)
    # The stored ratio has an interval too: what lies within it is no change.
    highest = max(base["interval"][1], old) if base["interval"] else old
    allowed = old * (1 + limit.change)
    if low > max(allowed, highest):
        return row(bad, change)
    if high <= max(allowed, highest):
        return row(Verdict.OK, change)
    if high / low > (1 + limit.change) ** 2:
        return row(Verdict.NOISY, change, "the interval is too wide to tell: a quieter machine")
    return row(Verdict.OK, change)


def _more_is_better(metric: str, now: Mapping[str, Any]) -> bool:
    return metric in _MORE_IS_BETTER or (metric == "quality" and now["higher_is_better"])


def _share(worse: float, old: float) -> float:
    if worse == 0:
        return 0.0
    return worse / abs(old) if old else (1.0 if worse > 0 else -1.0)


def _other_machine(metric: str, base: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if metric not in ("latency-measured", "latency-estimated", "peak-memory"):
        return ""
    differences = machine_differences(base["machine"], now["machine"])
    return f"the baseline is from another machine ({differences[0]})" if differences else ""


def _other_metric(metric: str, base: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if metric != "quality" or base["quality_metric"] == now["quality_metric"]:
        return ""
    return f"the baseline has {base['quality_metric']}, this run {now['quality_metric']}"


def changed_formats(
    base: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Layers whose format changed: path, old, new; empty texts for a layer of one side only."""
    old = base["formats"] if base else now["formats"]
    paths = sorted({*old, *now["formats"]})
    told = [(path, old.get(path, ""), now["formats"].get(path, "")) for path in paths]
    return [one for one in told if one[1] != one[2]]


def updated(
    base: Mapping[str, Any] | None, now: Mapping[str, Any], rows: Iterable[Row]
) -> dict[str, Any]:
    """The new entry of a model: measured values that did not change beyond noise stay as stored."""
    if base is None:
        return dict(now)
    steady = {"latency-measured", "peak-memory"}
    kept = {
        row.metric for row in rows
        if row.metric in steady and row.verdict in (Verdict.OK, Verdict.NOISY)
        and row.base is not None and row.limit and abs(row.change or 0) <= row.limit.change
    }  # fmt: skip
    entry = {**now, "rows": {**now["rows"], **{name: base["rows"][name] for name in kept}}}
    if "latency-measured" in kept:
        entry["interval"] = base["interval"]
    return entry


def read_baseline(data: Any, name: str) -> dict[str, dict[str, Any]]:
    """The entries of a baseline by model. Raises InputError for what is not one."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(
            f"{name} is no baseline of schema {SCHEMA}",
            code="baseline-schema",
            hint="mopt check --update-baseline writes one",
        )
    models = data.get("models")
    if not isinstance(models, dict):
        raise InputError(f"{name} has no models", code="malformed-baseline")
    for model, entry in models.items():
        wrong = _wrong(entry)
        if wrong:
            raise InputError(
                f"{name}: {wrong} of the model {model!r} is missing or malformed",
                code="malformed-baseline",
                hint="mopt check --update-baseline writes it anew",
            )
    return models


def _wrong(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "the entry"
    rows, interval = entry.get("rows"), entry.get("interval")
    checks = {
        "rows": isinstance(rows, dict) and all(map(_is_number, rows.values())),
        "interval": "interval" in entry and (interval is None or (
            isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)))),
        "quality_metric": isinstance(entry.get("quality_metric"), str),
        "machine": isinstance(entry.get("machine"), dict),
        "formats": isinstance(entry.get("formats"), dict)
        and all(isinstance(text, str) for text in entry["formats"].values()),
    }  # fmt: skip
    return next((key for key, good in checks.items() if not good), "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def baseline_data(entries: Mapping[str, Any], version: str) -> dict[str, Any]:
    """What the baseline file holds."""
    return {"schema": SCHEMA, "mopt": version, "models": dict(entries)}
