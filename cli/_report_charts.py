"""The pictures of a report as plain SVG: no script needed, colours come from the style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mopt.cli._html import Html, tag
from mopt.cli._report_parts import Block, Point, loads
from mopt.cli._text import disk_size, memory_size

# Buffers drawn; the rest would be thinner than a pixel and is told by the curve of live bytes.
_DRAWN = 1500
_CURVE = 800
# Frames around more layers than this would hide their colours.
_FRAMED = 60
CHART_WIDTH, CHART_LEFT, CHART_RIGHT = 960, 76, 12


def tones(layers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The colour of each format: the five with most bytes get one, 0 is every other."""
    weight: dict[str, int] = {}
    for row in layers:
        weight[row["format"]] = weight.get(row["format"], 0) + row["bytes_before"]
    ordered = sorted(weight, key=lambda name: (-weight[name], name))
    return {name: index + 1 if index < 5 else 0 for index, name in enumerate(ordered)}


def layer_strip(layers: Sequence[Mapping[str, Any]]) -> Html:
    """Two bars on one scale, before and after: every layer as wide as its bytes."""
    whole = max(sum(row[key] for row in layers) for key in ("bytes_before", "bytes_after"))
    if whole <= 0:
        return Html("")
    tone = tones(layers)
    room = CHART_WIDTH - CHART_LEFT - CHART_RIGHT
    marks = []
    for y, key, word in ((4, "bytes_before", "before"), (40, "bytes_after", "after")):
        marks.append(tag("text", word, x=CHART_LEFT - 8, y=y + 19, text_anchor="end"))
        x = float(CHART_LEFT)
        for row in layers:
            width = room * row[key] / whole
            name = f"{row['path'] or 'top level'}: {row['format']}, {disk_size(row[key])}"
            of = 0 if key == "bytes_before" else tone[row["format"]]
            kind = "part" if len(layers) <= _FRAMED else "thin"
            marks.append(tag("rect", tag("title", name), x=at(x), y=y, width=at(width),
                             height=28, class_=f"{kind} tone{of}"))  # fmt: skip
            x += width
    return picture(marks, 74, "Bytes of every layer before and after, on one scale")


def legend(layers: Sequence[Mapping[str, Any]]) -> Html:
    """The formats with their colours, words and layers."""
    many: dict[str, int] = {}
    for row in layers:
        many[row["format"]] = many.get(row["format"], 0) + 1
    items = [
        tag("li", tag("span", "", class_=f"key tone{index}"), f"{name} ({many[name]})")
        for name, index in tones(layers).items()
    ]
    return tag("ul", *items, class_="legend")


def memory_chart(found: Sequence[Block], steps: Sequence[str]) -> tuple[Html, str]:
    """Buffers as rectangles (offset by step), the live bytes as a line, the peak marked.

    Also one sentence that says the same.
    """
    curve = list(loads(list(found)))
    peak_step, peak = max(curve, key=lambda point: point[1])
    first = min(block.lower for block in found)
    last = max(block.upper for block in found)
    placed = [block for block in found if block.offset is not None]
    top = max([peak, *(block.size + (block.offset or 0) for block in placed)])
    room, height = CHART_WIDTH - CHART_LEFT - CHART_RIGHT, 300

    def x(step: float) -> float:
        return CHART_LEFT + room * (step - first) / (last - first)

    def y(size: float) -> float:
        return 8 + height * (1 - size / top)

    marks = [axis(top, height, y)]
    for index, block in enumerate(sorted(placed, key=lambda b: (-b.size, b.lower))[:_DRAWN]):
        start = block.offset or 0
        name = (f"{block.name}: {memory_size(block.size)} at {start:,}, "
                f"steps {block.lower} to {block.upper - 1}")  # fmt: skip
        marks.append(tag(
            "rect", tag("title", name), x=at(x(block.lower)), y=at(y(start + block.size)),
            width=at(x(block.upper) - x(block.lower)), height=at(height * block.size / top),
            class_=f"buffer tone{index % 5 + 1}",
        ))  # fmt: skip
    marks.append(tag("polyline", points=_stairs(curve, x, y), class_="live"))
    where = steps[peak_step] if peak_step < len(steps) else ""
    moment = f"step {peak_step}" + (f" ({where})" if where else "")
    marks.append(tag("line", x1=at(x(peak_step)), x2=at(x(peak_step)), y1=8, y2=8 + height,
                     class_="peak"))  # fmt: skip
    side = "start" if x(peak_step) < CHART_WIDTH / 2 else "end"
    shift = 6 if side == "start" else -6
    marks.append(tag("text", f"peak {memory_size(peak)}", x=at(x(peak_step) + shift), y=22,
                     text_anchor=side, class_="strong"))  # fmt: skip
    marks.append(tag("text", f"step {first}", x=CHART_LEFT, y=height + 28))
    marks.append(tag("text", f"step {last - 1}", x=CHART_WIDTH - CHART_RIGHT, y=height + 28,
                     text_anchor="end"))  # fmt: skip
    said = f"At most {memory_size(peak)} are alive at once, from {moment} on (planned)."
    return picture(marks, height + 34, f"Memory over time. {said}"), said


def _stairs(curve: list[tuple[int, int]], x: Any, y: Any) -> str:
    """The corner points of a step function, the highest of each run where there are too many."""
    every = -(-len(curve) // _CURVE)
    kept = [max(curve[i : i + every], key=lambda p: p[1]) for i in range(0, len(curve), every)]
    corners, level = [], 0
    for step, live in kept:
        corners += [f"{at(x(step))},{at(y(level))}", f"{at(x(step))},{at(y(live))}"]
        level = live
    return " ".join(corners)


def axis(top: float, height: int, y: Any) -> Html:
    """Three lines with their amounts of memory, up to ``top``."""
    marks = []
    for part in (0, 0.5, 1):
        marks.append(tag("line", x1=CHART_LEFT, x2=CHART_WIDTH - CHART_RIGHT, y1=at(y(part * top)),
                         y2=at(y(part * top)), class_="grid"))  # fmt: skip
        marks.append(tag("text", memory_size(part * top), x=CHART_LEFT - 8,
                         y=at(y(part * top) + 4 + 4 * part), text_anchor="end"))  # fmt: skip
    return tag("g", *marks)


def front_chart(points: Sequence[Point]) -> Html:
    """Size to the right, lost quality upwards: low and left is better, the chosen one is filled."""
    height, room = 240, CHART_WIDTH - CHART_LEFT - CHART_RIGHT - 20
    right = max(point.size for point in points) or 1
    most = max([*(point.loss for point in points), 0.0]) or 1.0
    least = min([*(point.loss for point in points), 0.0])
    span = (most - least) or 1.0

    def x(size: float) -> float:
        return CHART_LEFT + room * (size / right)

    def y(loss: float) -> float:
        return 12 + height * (1 - (loss / span - least / span))

    marks = [
        tag(
            "line",
            x1=CHART_LEFT,
            x2=CHART_WIDTH - CHART_RIGHT,
            y1=at(y(0)),
            y2=at(y(0)),
            class_="grid",
        ),
        tag("line", x1=CHART_LEFT, x2=CHART_LEFT, y1=12, y2=12 + height, class_="grid"),
        tag("text", f"{100 * most:.3g} %", x=CHART_LEFT - 8, y=20, text_anchor="end"),
        tag("text", "0 %", x=CHART_LEFT - 8, y=at(y(0) + 4), text_anchor="end"),
        tag("text", disk_size(right), x=at(x(right)), y=height + 32, text_anchor="end"),
        tag("text", "0 B", x=CHART_LEFT, y=height + 32),
    ]
    line = sorted((p for p in points if p.kind == "front"), key=lambda p: p.size)
    if len(line) > 1:
        path = " ".join(f"{at(x(p.size))},{at(y(p.loss))}" for p in line)
        marks.append(tag("polyline", points=path, class_="live"))
    for point in points:
        name = (f"{point.name}: {disk_size(point.size)}, {100 * point.loss:.3g} % lost, "
                f"{point.source}")  # fmt: skip
        radius = 8 if point.kind == "chosen" else 5
        marks.append(
            tag("circle", tag("title", name), cx=at(x(point.size)), cy=at(y(point.loss)),
                r=radius, class_=f"point {point.kind}")
        )  # fmt: skip
        if point.kind == "chosen":
            marks.append(tag("text", "chosen", x=at(x(point.size) + 12), y=at(y(point.loss) + 4),
                             class_="strong"))  # fmt: skip
    return picture(marks, height + 40, "Size against lost quality, the chosen point filled")


def picture(marks: Sequence[Html], height: float, label: str) -> Html:
    """A picture of that height with what it shows in words."""
    drawn = tag("svg", *marks, viewBox=f"0 0 {CHART_WIDTH} {height}", role="img", aria_label=label)
    return tag("div", drawn, class_="chart")


def at(value: float) -> str:
    """A coordinate as SVG wants it."""
    return f"{value:.1f}"
