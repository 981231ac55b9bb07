"""The plan of a training step over the depth of the model, as pictures and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mopt.cli._html import Html, tag
from mopt.cli._report_charts import CHART_LEFT, CHART_RIGHT, CHART_WIDTH, at, axis, picture
from mopt.cli._report_parts import number, rows, table, text
from mopt.cli._text import memory_size, milliseconds

# What may become of the values that backward reads, with the tone of each.
_FATES = (
    ("kept_bytes", "kept", 1),
    ("squeezed_bytes", "compressed", 2),
    ("dropped_bytes", "recomputed or restored", 3),
    ("offloaded_bytes", "offloaded", 4),
)
_HEIGHT = 200
_BARS = 400
_POINTS = 800


def training_plan(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The plan of a training step in a report; empty without one."""
    return table(report.get("training"))


def layer_rows(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers of a plan in depth order with bytes of each fate; what is no number counts 0."""
    return [
        {
            "layer": text(row.get("layer")) or "top level",
            **{key: max(number(row.get(key)) or 0, 0) for key, _, _ in _FATES},
            "calls": max(number(row.get("repeated_calls")) or 0, 0),
            "seconds": max(number(row.get("repeated_seconds")) or 0, 0),
        }
        for row in rows(plan.get("layers"))
    ]


def depth_chart(found: Sequence[Mapping[str, Any]]) -> Html:
    """A bar for each layer from the first to the last, stacked by what becomes of its values."""
    shown = list(found[:_BARS])
    most = max((sum(row[key] for key, _, _ in _FATES) for row in shown), default=0)
    if not shown or most <= 0:
        return Html("")
    wide = (CHART_WIDTH - CHART_LEFT - CHART_RIGHT) / len(shown)
    marks = [axis(most, _HEIGHT, lambda size: 8 + _HEIGHT * (1 - size / most))]
    for index, row in enumerate(shown):
        level = 0.0
        for key, word, tone in _FATES:
            if not row[key]:
                continue
            name = f"{row['layer']}: {memory_size(row[key])} {word}"
            high = _HEIGHT * row[key] / most
            level += high
            marks.append(tag(
                "rect", tag("title", name), x=at(CHART_LEFT + index * wide),
                y=at(8 + _HEIGHT - level), width=at(wide), height=at(high),
                class_=f"part tone{tone}",
            ))  # fmt: skip
    marks.append(tag("text", "first layer", x=CHART_LEFT, y=_HEIGHT + 28))
    marks.append(tag("text", "last layer", x=CHART_WIDTH - CHART_RIGHT, y=_HEIGHT + 28,
                     text_anchor="end"))  # fmt: skip
    return picture(marks, _HEIGHT + 34, "What becomes of each layer's values until backward")


def legend() -> Html:
    """The fates with their tones."""
    return tag(
        "ul",
        *(tag("li", tag("span", "", class_=f"key tone{tone}"), word) for _, word, tone in _FATES),
        class_="legend",
    )


def live_chart(plan: Mapping[str, Any]) -> Html:
    """Bytes alive at each call of the planned step, over those of the plain step."""
    planned = _bytes(row.get("bytes") for row in rows(plan.get("timeline")))
    given = plan.get("plain_timeline")
    plain = _bytes(given if isinstance(given, list) else [])
    most = max([*planned, *plain], default=0)
    if most <= 0:
        return Html("")
    room = CHART_WIDTH - CHART_LEFT - CHART_RIGHT
    marks = [axis(most, _HEIGHT, lambda size: 8 + _HEIGHT * (1 - size / most))]
    for values, kind in ((plain, "plain"), (planned, "live")):
        every = max(1, -(-len(values) // _POINTS))
        points = " ".join(
            f"{at(CHART_LEFT + room * i / max(len(values) - 1, 1))},"
            f"{at(8 + _HEIGHT * (1 - max(values[i : i + every]) / most))}"
            for i in range(0, len(values), every)
        )
        marks.append(tag("polyline", points=points, class_=kind))
    marks.append(tag("text", "forward", x=CHART_LEFT, y=_HEIGHT + 28))
    marks.append(tag("text", "backward", x=CHART_WIDTH - CHART_RIGHT, y=_HEIGHT + 28,
                     text_anchor="end"))  # fmt: skip
    return picture(marks, _HEIGHT + 34, "Bytes alive during the step: planned, and plain (dashed)")


def _bytes(values: Any) -> list[float]:
    return [max(number(value) or 0, 0) for value in values]


def training_section(report: Mapping[str, Any], draw_table: Any) -> Html:
    """The whole section; empty where no training step was planned."""
    plan = training_plan(report)
    if not plan:
        return Html("")
    found = layer_rows(plan)
    facts = []
    for key, word in (("budget", "budget"), ("peak", "planned peak"), ("plain_peak", "plain step"),
                      ("peak_bound", "no plan is below")):  # fmt: skip
        size = number(plan.get(key))
        if size is not None:
            facts.append(f"{word}: {memory_size(size)}")
    again, step = number(plan.get("repeated_seconds")), number(plan.get("step_seconds"))
    if again is not None and step:
        facts.append(f"computed again: {100 * again / step:.1f} % of the step's time, estimated")
    body = [
        [row["layer"], *(memory_size(row[key]) for key, _, _ in _FATES), f"{row['calls']:g}",
         milliseconds(1e3 * row["seconds"])]
        for row in found
    ]  # fmt: skip
    heads = ["layer", *(f"{word}#" for _, word, _ in _FATES), "calls again#", "time again#"]
    return tag(
        "section",
        tag("h2", "Training step"),
        tag("p", "; ".join(facts)),
        depth_chart(found),
        legend(),
        live_chart(plan),
        tag("details", tag("summary", f"{len(found)} layers"), draw_table(heads, body)),
    )
