"""What a report and a memory plan say, read so that nothing in them can be of the wrong type.

``read_stored_report`` has checked what every report has. The rest (choices, estimates, fronts,
memory plans) depends on the recipe and may be a stranger's: what is malformed reads as absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from mopt.cli._stored_report import read_stored_report
from mopt.errors import ArtifactError

PLAN = "plan.json"
_LEAST, _MOST = 1e-100, 1e100


@dataclass(frozen=True)
class Given:
    """What is drawn: the report of an artifact, and its memory plan if it has one."""

    report: dict[str, Any]
    plan: dict[str, Any] | None = None


@dataclass(frozen=True)
class Block:
    """One buffer of a plan: alive in ``[lower, upper)``; ``offset`` is None outside the arena."""

    name: str
    lower: int
    upper: int
    size: int
    offset: int | None


def read_given(folder: str | Path, *, or_training: bool = False) -> Given:
    """Report and plan of an artifact. Raises ArtifactError ``no-report``, or what reading does.

    ``or_training`` is as for ``read_stored_report``.
    """
    report = read_stored_report(folder, or_training=or_training)
    if report is None:
        raise ArtifactError(
            f"{str(folder)!r} holds no report.json",
            code="no-report",
            hint="mopt compile writes one; mopt.lower alone does not",
        )
    return Given(report, read_plan(folder))


def read_plan(folder: str | Path) -> dict[str, Any] | None:
    """The memory plan in a folder, None without one. Raises what reading JSON does."""
    from mopt.json_files import parse_json
    from mopt.limits import DEFAULT_LIMITS
    from mopt.safe_read import Folder

    with Folder(folder) as opened:
        if not opened.has(PLAN):
            return None
        limit = DEFAULT_LIMITS.json_plan_bytes
        with opened.open_file(PLAN, max_bytes=limit) as file:
            plan = parse_json(
                file.read(), name=PLAN, max_bytes=limit,
                max_values=DEFAULT_LIMITS.json_plan_values, error=ArtifactError,
            )  # fmt: skip
    return plan if isinstance(plan, dict) else None


def table(value: Any) -> Mapping[str, Any]:
    """A table, empty where there is none."""
    return value if isinstance(value, dict) else {}


def rows(value: Any) -> list[Mapping[str, Any]]:
    """The tables of a list."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def texts(value: Any) -> list[str]:
    """The texts of a list."""
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def text(value: Any, other: str = "") -> str:
    """A text, ``other`` where there is none."""
    return value if isinstance(value, str) else other


def number(value: Any) -> float | None:
    """A finite number that can be calculated with, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return None
    return value if value == 0 or _LEAST < abs(value) < _MOST else None


def count(value: Any) -> int | None:
    """A whole number from 0 on, or None."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return None
    return value


def chosen_candidate(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was expected of the format a layer got; empty where nothing was chosen."""
    name = layer.get("option", layer.get("format"))
    found = (row for row in rows(layer.get("candidates")) if row.get("format") == name)
    return next((row for row in found if "reason" not in row), {})


def blocks(plan: Mapping[str, Any]) -> list[Block]:
    """The buffers of a memory plan that hold bytes for some time, each from when the one whose
    memory it takes over, if any, is done."""
    found = []
    listed = rows(plan.get("buffers"))
    ends = {text(row.get("id")): count(row.get("upper")) for row in listed}
    for index, row in enumerate(listed):
        lower, upper, size = (count(row.get(key)) for key in ("lower", "upper", "bytes"))
        if lower is not None and row.get("shares") is not None:
            lower = max(lower, ends.get(text(row.get("shares"))) or 0)
        if lower is None or upper is None or not size or upper <= lower:
            continue
        offset = count(row.get("offset")) if row.get("where") == "arena" else None
        found.append(Block(text(row.get("id"), f"buffer {index}"), lower, upper, size, offset))
    return found


def loads(found: list[Block]) -> Iterator[tuple[int, int]]:
    """Each step at which the live bytes change, with the bytes from there on."""
    changes: dict[int, int] = {}
    for block in found:
        changes[block.lower] = changes.get(block.lower, 0) + block.size
        changes[block.upper] = changes.get(block.upper, 0) - block.size
    live = 0
    for step in sorted(changes):
        live += changes[step]
        yield step, live


def step_names(plan: Mapping[str, Any]) -> list[str]:
    """The nodes of a plan's schedule, in order."""
    return [text(row.get("node")) for row in rows(plan.get("steps"))]


@dataclass(frozen=True)
class Guess:
    """An estimate beside what was measured of the same thing."""

    what: str
    unit: str
    estimated: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """Estimated over measured, minus one."""
        if self.estimated is None or not self.measured:
            return None
        return self.estimated / self.measured - 1


def guesses(report: Mapping[str, Any]) -> list[Guess]:
    """Size, latency and memory, before and after: those with at least one of the two numbers."""
    size = number(table(report.get("estimates")).get("size_bytes"))
    found = [Guess("size, after", "disk", size, report["result"]["size_bytes"])]
    for side, word in (("baseline", "before"), ("result", "after")):
        for key, what, unit in (("latency_ms", "latency", "ms"), ("peak_bytes", "memory", "bytes")):
            pair = report[side][key]
            found.append(Guess(f"{what}, {word}", unit, pair["estimated"], pair["measured"]))
    return [one for one in found if (one.estimated, one.measured) != (None, None)]


@dataclass(frozen=True)
class Point:
    """One possible result: bytes on disk against the share of quality lost."""

    name: str
    kind: str
    size: float
    loss: float
    source: str


def trade_off(report: Mapping[str, Any]) -> list[Point]:
    """The uncompressed model, the front if one was solved, and every round that was built."""
    choice = table(report.get("choice"))
    if not choice:
        return []
    points = [Point("uncompressed", "before", report["baseline"]["size_bytes"], 0.0, "measured")]
    for row in rows(report.get("front")):
        size, loss = number(row.get("size")), number(row.get("loss"))
        if size is not None and loss is not None:
            points.append(Point(text(row.get("budget")), "front", size, loss, "estimated"))
    built = rows(report.get("rounds"))
    for index, row in enumerate(built, 1):
        measured, guess = table(row.get("measured")), table(row.get("estimated"))
        size, loss = number(measured.get("size")), number(measured.get("loss"))
        source = "measured"
        if loss is None:
            loss, source = number(guess.get("loss")), "estimated"
        if size is not None and loss is not None:
            kept = size == report["result"]["size_bytes"]
            points.append(
                Point(f"round {index}", "chosen" if kept else "round", size, loss, source)
            )
    if not any(point.kind == "chosen" for point in points):
        loss = number(table(choice.get("estimated")).get("loss"))
        if loss is not None:
            size = report["result"]["size_bytes"]
            points.append(Point("this result", "chosen", size, loss, "estimated"))
    return points


def repeat_command(report: Mapping[str, Any]) -> str:
    """The command that makes the artifact again; MODEL stands for what the user gave."""
    import shlex

    parts = ["mopt", "compile", "MODEL", "-r", "recipe.toml"]
    for key, flag in (("target", "-t"), ("backend", "-b")):
        if text(report.get(key)):
            parts += [flag, report[key]]
    for limit in texts(report.get("budget")):
        parts += ["--budget", limit]
    seed = count(report.get("seed"))
    return shlex.join([*parts, "--seed", str(seed or 0)])
