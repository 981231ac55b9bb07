"""The steps of a compile and the memory plan as Chrome's trace events, which Perfetto opens.

Only what every viewer agrees on: complete events that do not overlap within a track, counters,
microseconds, one process per lane.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mopt.cli._report_parts import Given, blocks, loads, number, step_names
from mopt.cli._text import safe

_COMPILE, _SCHEDULE = 1, 2
# The planned schedule has steps, not times: each is drawn as one millisecond.
_STEP_US = 1000


def trace_json(given: Given) -> str:
    """The whole trace as text."""
    events = _compile(given.report)
    if given.plan is not None:
        events += _schedule(given.plan)
    document = {"displayTimeUnit": "ms", "traceEvents": events}
    return json.dumps(document, sort_keys=True, allow_nan=False) + "\n"


def _name(process: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": process, "tid": 1, "args": {"name": name}}


def _compile(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    events = [_name(_COMPILE, f"compile of {safe(report['model'])} (measured)")]
    start = 0
    for step in report["steps"]:
        took = max(round(1e6 * (number(step.get("seconds")) or 0)), 1)
        events.append({
            "ph": "X", "name": safe(step["name"]), "cat": "compile", "pid": _COMPILE, "tid": 1,
            "ts": start, "dur": took,
            "args": {"numerics": safe(step["numerics"]), "skipped": len(step["skipped"])},
        })  # fmt: skip
        start += took
        size = number(step.get("bytes_after"))
        if size is not None:
            events.append(_counter(_COMPILE, "model bytes", start, size))
    return events


def _schedule(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = blocks(plan)
    if not found:
        return []
    events = [_name(_SCHEDULE, "planned schedule (1 ms a step, not measured)")]
    for index, node in enumerate(step_names(plan)):
        events.append({
            "ph": "X", "name": safe(node) or f"step {index}", "cat": "schedule",
            "pid": _SCHEDULE, "tid": 1, "ts": index * _STEP_US, "dur": _STEP_US,
        })  # fmt: skip
    events += [_counter(_SCHEDULE, "planned bytes", at * _STEP_US, live)
               for at, live in loads(found)]  # fmt: skip
    return events


def _counter(process: int, name: str, at: int, value: float) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": process, "tid": 1, "ts": at, "args": {"bytes": value}}
