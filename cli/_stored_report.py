"""The report of an artifact, checked before anything is printed from it: it may be a stranger's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mopt.errors import ArtifactError, quote
from mopt.report import SCHEMA

Check = Callable[[Any], bool]
_LEAST, _MOST = 1e-100, 1e100


def read_stored_report(folder: str | Path, *, or_training: bool = False) -> dict[str, Any] | None:
    """The content of ``report.json``, or None when the artifact has none.

    With ``or_training`` it may also be the report of a training plan, which has no layers.

    Raises ArtifactError ``malformed-report`` naming the first key that is not as it should be, and
    ``training-report`` for the plan of a training step where that is of no use.
    """
    from mopt.lowering import REPORT, read_report
    from mopt.safe_read import Folder

    with Folder(folder) as opened:
        if not opened.has(REPORT):
            return None
    data: Any = read_report(folder).data
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else data
        raise ArtifactError(
            f"report schema {quote(found)}, this mopt reads {SCHEMA}",
            code="report-schema",
            hint="install the mopt that made it, or compile again",
        )
    # mopt train-plan writes the plan of a step alone.
    alone = "training" in data and "layers" not in data
    if alone and not or_training:
        raise ArtifactError(
            "report.json holds the plan of a training step, without a compiled model",
            code="training-report",
            hint="mopt report shows it as a page, or as JSON with --format json",
        )
    wanted = {"training": _is_table} if alone else _REPORT
    wrong = _first_wrong(data, wanted, "") or ("" if alone else _time_missing_beside_speed(data))
    if wrong:
        raise ArtifactError(
            f"report.json: {wrong} is missing or malformed",
            code="malformed-report",
            hint="the file is damaged or hostile; compile again, or fetch the artifact again",
        )
    return data


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    """A number whose quotients with others stay finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or (math.isfinite(value) and _LEAST < abs(value) < _MOST)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(_count(size) for size in value)


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


_PAIR = {"measured": _maybe(_number), "estimated": _maybe(_number)}
_SIDE = {"size_bytes": _count, "peak_bytes": _PAIR, "latency_ms": _PAIR}
_SPEED = {
    "ratio": _positive, "ratio_low": _positive, "ratio_high": _positive, "confidence": _number,
    "pairs": _count, "eager_ms": _maybe(_positive),
}  # fmt: skip
_QUALITY = {
    "metric": _maybe(_text), "higher_is_better": _maybe(_flag), "baseline": _maybe(_number),
    "result": _maybe(_number), "batches": _count, "cosine": _number, "sqnr_db": _maybe(_number),
}  # fmt: skip
_LAYER = {
    "path": _text, "kind": _text, "shape": _sizes, "flops": _count, "format": _text,
    "source": _text, "bytes_before": _count, "bytes_after": _count,
}  # fmt: skip
_REPORT: dict[str, Any] = {
    "model": _text,
    "recipe": _text,
    "baseline": _SIDE,
    "result": _SIDE,
    "speed": (_SPEED,),
    "quality": _QUALITY,
    "coverage": {
        "parameters": _number,
        "flops": _number,
        "outside": [{"path": _text, "reason": _text, "source": _text}],
    },
    "layers": [_LAYER],
    "steps": [{
        "name": _text, "numerics": _text, "skipped": [{"site": _text, "reason": _text}],
    }],
}  # fmt: skip


def _time_missing_beside_speed(report: dict[str, Any]) -> str:
    """A ratio of measured times is shown beside them."""
    for side in ("baseline", "result") if report["speed"] is not None else ():
        if not _positive(report[side]["latency_ms"]["measured"]):
            return f"{side}.latency_ms.measured"
    return ""


def _first_wrong(value: Any, wanted: Any, path: str) -> str | None:
    """The path of the first part that differs; ``[x]`` is a list of x, ``(x,)`` an x or none."""
    if isinstance(wanted, tuple):
        return None if value is None else _first_wrong(value, wanted[0], path)
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return path
        parts = ((item, wanted[0], f"{path}[{i}]") for i, item in enumerate(value))
    elif isinstance(wanted, dict):
        if not isinstance(value, dict):
            return path
        missing = next((key for key in wanted if key not in value), None)
        if missing is not None:
            return f"{path}.{missing}".lstrip(".")
        parts = ((value[key], sub, f"{path}.{key}".lstrip(".")) for key, sub in wanted.items())
    else:
        return None if wanted(value) else path
    return next(filter(None, (_first_wrong(*part) for part in parts)), None)
