"""The report as one HTML page that needs nothing else: no network, no files beside it.

Everything is in the HTML itself, so it reads and prints with scripts off; the script only sorts,
filters and opens details, from the same data inlined as JSON. A policy in the page forbids every
script and style but its own, by hash, and every connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from mopt.cli import _report_charts as charts
from mopt.cli._html import Html, tag
from mopt.cli._report_parts import (
    Given,
    Guess,
    blocks,
    chosen_candidate,
    guesses,
    loads,
    number,
    repeat_command,
    rows,
    step_names,
    table,
    text,
    texts,
    trade_off,
)
from mopt.cli._report_training import training_plan, training_section
from mopt.cli._summary import remarks, result_rows
from mopt.cli._text import change, count, disk_size, memory_size, milliseconds, plural, seconds

_BUFFERS_TOLD = 20
_SKIPS_TOLD = 400


def html_page(given: Given) -> str:
    """The whole page."""
    report = given.report
    if "layers" not in report:
        return _page("training step", [_training_head(report), training_section(report, _table)])
    sections = [
        _summary(report), _trade_off(report), _layers(report), _memory(given.plan),
        training_section(report, _table), _guesses(report), _steps(report), _coverage(report),
        _environment(report),
    ]  # fmt: skip
    return _page(report["model"], sections, inline_json(_inlined(report)))


def _training_head(report: Mapping[str, Any]) -> Html:
    plan = training_plan(report)
    return tag(
        "section",
        tag("h1", text(plan.get("model")) or "training step"),
        tag("p", f"optimizer: {text(plan.get('optimizer'))}; nothing was run", class_="soft"),
    )


def _page(title: str, sections: Sequence[Html], data: str = '{"layers":[]}') -> str:
    style, script = _own_parts()
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} - mopt report"),
        Html(f"<style>{style}</style>"),
    )
    inlined = Html(f'<script type="application/json" id="data">{data}</script>')
    body = tag("body", tag("main", *sections), inlined, Html(f"<script>{script}</script>"))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def inline_json(value: Any) -> str:
    """JSON that no text in it can end or change the page around it."""
    written = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    return written


def _own_parts() -> tuple[str, str]:
    page = files("mopt.cli").joinpath("report_page.html").read_text(encoding="utf-8")
    found = re.fullmatch(r"<style>(.*)</style>\s*<script>(.*)</script>\s*", page, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _inlined(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the script needs: the candidates of each layer, only of the types it expects."""
    layers = []
    for row in report["layers"]:
        candidates: list[dict[str, Any]] = []
        for one in rows(row.get("candidates")):
            if "reason" in one:
                candidates.append({"format": text(one.get("format")), "reason": str(one["reason"])})
                continue
            candidates.append(
                {key: text(one.get(key)) for key in ("format", "latency_source", "loss_source")}
                | {key: number(one.get(key)) for key in ("size_bytes", "latency_ms", "loss")}
            )
        layers.append({
            "candidates": candidates, "why": text(row.get("why")),
            "option": text(row.get("option"), row["format"]), "runner_up": row.get("runner_up"),
        })  # fmt: skip
    return {"layers": layers}


def _table(heads: Sequence[str], body: Sequence[Sequence[object]], caption: str = "") -> Html:
    """A table; heads that end in # are of numbers."""
    right = [head.endswith("#") for head in heads]
    top = _heads(heads)
    lines = [
        tag("tr", *(
            tag("td", cell, class_="n" if is_right else None)
            for cell, is_right in zip(row, right, strict=True)
        ))
        for row in body
    ]  # fmt: skip
    named = [tag("caption", caption)] if caption else []
    return tag("div", tag("table", *named, tag("thead", tag("tr", *top)), tag("tbody", *lines)),
               class_="scroll")  # fmt: skip


def _heads(names: Sequence[str]) -> list[Html]:
    return [
        tag("th", name.rstrip("#"), scope="col", class_="n" if name.endswith("#") else None)
        for name in names
    ]


def _summary(report: Mapping[str, Any]) -> Html:
    told = result_rows(report, verbose=True)
    cards = [
        tag("li", tag("b", gain), name.strip(), ", ", tag("span", how, class_="soft"))
        for name, _, _, gain, how in told
        if gain and name.strip()
    ]
    notes = remarks(report)
    details = ", ".join(filter(None, (
        report["recipe"], text(report.get("backend")), text(report.get("target")),
        *texts(report.get("budget")),
    )))  # fmt: skip
    return tag(
        "section",
        tag("h1", report["model"]),
        tag("p", details, class_="soft"),
        tag("ul", *cards, class_="cards"),
        _table(["", "before#", "after#", "change", "found how"], told),
        *(tag("p", note) for note in notes if note),
    )


def _trade_off(report: Mapping[str, Any]) -> Html:
    points = trade_off(report)
    if len(points) < 2:
        return Html("")
    body = [[p.name, p.kind, disk_size(p.size), f"{100 * p.loss:.3g} %", p.source] for p in points]
    has_front = any(p.kind == "front" for p in points)
    said = "The line is the front of best choices." if has_front else "The results that were built."
    return tag(
        "section",
        tag("h2", "Trade-off"),
        tag("p", f"{said} Lower and further left is better.", class_="soft"),
        charts.front_chart(points),
        _table(["point", "kind", "size#", "quality lost#", "found how"], body),
    )


def _layers(report: Mapping[str, Any]) -> Html:
    layers = report["layers"]
    if not layers:
        return tag("section", tag("h2", "Layers"), tag("p", "No layer with weights was found."))
    formats = sorted({row["format"] for row in layers})
    options = [tag("option", "every format", value="")]
    options += [tag("option", name, value=name) for name in formats]
    controls = tag(
        "div",
        tag("label", "Search ", tag("input", type="search", id="search")),
        tag("label", "Format ", tag("select", *options, id="format")),
        tag("span", "", id="shown", role="status"),
        id="controls", class_="controls", hidden=True,
    )  # fmt: skip
    heads = ("path", "kind", "shape", "format", "before#", "after#", "change#", "FLOPs#",
             "latency#", "quality cost#", "source")  # fmt: skip
    top = _heads(heads)
    body = [_layer_row(index, row) for index, row in enumerate(layers)]
    whole = tag("table", tag("thead", tag("tr", *top)), tag("tbody", *body), id="layers")
    return tag(
        "section",
        tag("h2", "Layers"),
        charts.layer_strip(layers),
        charts.legend(layers),
        tag("p", "Bytes are measured. Latency and quality cost are those of the chosen candidate, "
            "with the layers that share its choice.", class_="soft"),
        controls,
        tag("div", whole, class_="scroll"),
    )  # fmt: skip


def _layer_row(index: int, row: Mapping[str, Any]) -> Html:
    before, after = row["bytes_before"], row["bytes_after"]
    candidate = chosen_candidate(row)
    latency, loss = number(candidate.get("latency_ms")), number(candidate.get("loss"))
    source = text(candidate.get("latency_source"), "estimated")
    how = "measured" if candidate.get("loss_source") == "exact" else "estimated"

    def value(shown: str, key: float | None) -> Html:
        return tag("td", shown, class_="n", data_sort="" if key is None else key)

    return tag(
        "tr",
        tag("td", row["path"] or "top level", class_="path"),
        tag("td", row["kind"]),
        tag("td", " x ".join(map(str, row["shape"]))),
        tag("td", row["format"]),
        value(disk_size(before), before),
        value(disk_size(after), after),
        value(change(before, after, "smaller", "larger"), after / before if before else None),
        value(count(row["flops"]), row["flops"]),
        value(f"{milliseconds(latency)} {source}" if latency is not None else "", latency),
        value(f"{100 * loss:.3g} % {how}" if loss is not None else "", loss),
        tag("td", row["source"], class_="path"),
        data_index=index,
        data_format=row["format"],
    )


def _memory(plan: Mapping[str, Any] | None) -> Html:
    found = blocks(plan) if plan is not None else []
    if plan is None or not found:
        return Html("")
    names = step_names(plan)
    picture, said = charts.memory_chart(found, names)
    peak_step, _ = max(loads(found), key=lambda point: point[1])
    alive = sorted((b for b in found if b.lower <= peak_step < b.upper), key=lambda b: -b.size)
    body = [
        [b.name, memory_size(b.size), "beside" if b.offset is None else f"{b.offset:,}",
         str(b.lower), str(b.upper - 1)]
        for b in alive[:_BUFFERS_TOLD]
    ]  # fmt: skip
    caption = f"Alive at the peak: the largest {len(body)} of {plural(len(alive), 'buffer')}"
    facts = []
    for key, word in (("peak_bytes", "planned peak"), ("lower_bound_bytes", "no plan is below"),
                      ("input_order_bytes", "in the order of the model")):  # fmt: skip
        amount = number(plan.get(key))
        if amount is not None:
            facts.append(f"{word}: {memory_size(amount)}")
    return tag(
        "section",
        tag("h2", "Memory over time"),
        tag("p", said),
        tag("p", "; ".join(facts), class_="soft"),
        picture,
        _table(["buffer", "size#", "offset#", "from step#", "to step#"], body, caption),
    )


def _guesses(report: Mapping[str, Any]) -> Html:
    found = guesses(report)
    body = [
        [one.what, _amount(one, one.estimated), _amount(one, one.measured),
         "" if one.error is None else f"{100 * one.error:+.1f} %"]
        for one in found
    ]  # fmt: skip
    return tag(
        "section",
        tag("h2", "Estimated against measured"),
        _table(["", "estimated#", "measured#", "error of the estimate#"], body),
    )


def _amount(one: Guess, value: float | None) -> str:
    if value is None:
        return "none"
    shown = {"disk": disk_size, "bytes": memory_size, "ms": milliseconds}[one.unit]
    return shown(value)


def _steps(report: Mapping[str, Any]) -> Html:
    body, skips = [], []
    for step in report["steps"]:
        took = number(step.get("seconds"))
        sizes = [number(step.get(key)) for key in ("bytes_before", "bytes_after")]
        body.append([
            step["name"], step["numerics"],
            _whether_changed(step.get("changed")),
            seconds(took) if took is not None else "",
            *("" if size is None else disk_size(size) for size in sizes),
            str(len(step["skipped"])),
        ])  # fmt: skip
        skips += [[step["name"], skip["site"], skip["reason"]] for skip in step["skipped"]]
    heads = ["pass", "numerics", "result", "took#", "before#", "after#", "skipped#"]
    parts = [tag("h2", "Steps"), _table(heads, body)]
    if skips:
        caption = f"Left alone, and why: {min(len(skips), _SKIPS_TOLD)} of {len(skips)} sites"
        told = _table(["pass", "site", "reason"], skips[:_SKIPS_TOLD])
        parts.append(tag("details", tag("summary", caption), told))
    return tag("section", *parts)


def _whether_changed(said: Any) -> str:
    return "changed" if said is True else "unchanged" if said is False else ""


def _coverage(report: Mapping[str, Any]) -> Html:
    coverage = report["coverage"]
    said = (f"{coverage['parameters']:.1%} of parameters and {coverage['flops']:.1%} of FLOPs "
            "are in the graph.")  # fmt: skip
    parts = [tag("h2", "Coverage"), tag("p", said)]
    if coverage["outside"]:
        body = [[p["path"] or "top level", p["reason"], p["source"]] for p in coverage["outside"]]
        caption = "Not captured: runs in PyTorch as before"
        parts.append(_table(["part", "reason", "source"], body, caption))
    return tag("section", *parts)


def _environment(report: Mapping[str, Any]) -> Html:
    environment = table(report.get("environment"))
    machine = table(environment.get("machine"))
    body = [["mopt", text(report.get("mopt"))], ["Python", text(environment.get("python"))]]
    body += [[k, text(v)] for k, v in sorted(table(machine.get("versions")).items()) if text(v)]
    body.append(["CPU", text(machine.get("cpu"))])
    cores, memory = number(machine.get("cores")), number(machine.get("memory_bytes"))
    body += [["cores", f"{cores:g}"]] if cores is not None else []
    body += [["memory", memory_size(memory)]] if memory is not None else []
    body.append(["instruction sets", ", ".join(texts(machine.get("isa")))])
    parts = [
        tag("h2", "Environment, and how to repeat it"),
        _table(["", ""], [row for row in body if row[1]]),
        tag("p", "MODEL is what was given as the model, recipe.toml is the text below."),
        tag("pre", repeat_command(report)),
    ]
    recipe = text(report.get("recipe_toml"))
    if recipe:
        lines = Html("\n".join(str(tag("span", line)) for line in recipe.split("\n")))
        parts.append(tag("details", tag("summary", "recipe.toml"), tag("pre", lines)))
    return tag("section", *parts)
