"""mopt report: what is in the page, the comment and the trace, whoever wrote the report."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mopt.cli.report import render
from tests.cli import report_fixture as made
from tests.cli.command_line import Call


class _Reader(HTMLParser):
    """The elements of a page, its visible text and what is wrong with its nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def draw(folder: Path, form: str, *args: Any) -> str:
    return render(made.write_artifact(folder, *args), form)


def test_the_page_says_everything_without_its_script(tmp_path: Path) -> None:
    rows = [made.layer("a.first", option="int8", candidates=made.candidates(), why="cheapest")]
    page = draw(tmp_path / "a", "html", made.report(rows), made.plan())
    words = " ".join(read(page).words)
    for part in (
        "5.72x smaller", "99 % sure: 1.92x to 2.08x", "a.first", "0.250 ms estimated",
        "0.1 % measured", "peak 12.0 KiB", "step 1 (linear)",
        "data-dependent branch", "net.py:41", "quantize-dynamic", "960 weights are too few",
        "mopt compile MODEL -r recipe.toml -t host -b onnx --budget 'size<=3MB' --seed 3",
    ):  # fmt: skip
        assert part in words, part


def test_the_page_reaches_for_nothing(tmp_path: Path) -> None:
    page = draw(tmp_path / "a", "html", None, made.plan())
    reader = read(page)
    assert not [value for name, value in reader.attributes if name in ("src", "href", "style")]
    assert not re.search(r"https?:", page)
    assert "default-src 'none'" in unescape(page) and "unsafe-inline" not in page
    assert "innerHTML" not in page


def test_names_cannot_become_script(tmp_path: Path) -> None:
    refused = [{"format": made.HOSTILE, "reason": "x"}]
    told = dict.fromkeys(("format", "source", "why"), made.HOSTILE)
    rows = [made.layer(made.HOSTILE, candidates=refused, **told)]
    data = made.report(rows, model=made.HOSTILE, recipe_toml=made.HOSTILE, budget=[made.HOSTILE])
    page = draw(tmp_path / "a", "html", data)
    reader = read(page)
    assert reader.seen.count("script") == 2 and "img" not in reader.seen
    assert made.HOSTILE in "".join(reader.words)
    inlined = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(inlined)["layers"][0]["why"] == made.HOSTILE


def test_a_comment_cannot_be_taken_over(tmp_path: Path) -> None:
    name = "`a` | @team #1 <b>x</b> [l](http://x) \n::add-mask::"
    text = draw(tmp_path / "a", "md", made.report([made.layer(name)], model=name))
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (4, 5, 6) for line in tables)
    assert "@" not in text and "<b>" not in text and "](" not in text
    assert not [line for line in text.splitlines() if line.startswith("::")]


def test_a_comment_drops_whole_sections(tmp_path: Path) -> None:
    outside = [{"path": "p" * 1000, "reason": "r" * 1000, "source": ""} for _ in range(40)]
    coverage = {"parameters": 0.5, "flops": 0.5, "outside": outside}
    text = draw(tmp_path / "a", "md", made.report(coverage=coverage))
    assert len(text) < 60_000
    assert "Left out, too long for a comment: coverage" in text


def test_two_hundred_layers_stay_small(tmp_path: Path) -> None:
    rows = [made.layer(f"blocks.{i}.attention.output", i, option="int8", why="x" * 200,
                       candidates=made.candidates(20)) for i in range(200)]  # fmt: skip
    page = draw(tmp_path / "a", "html", made.report(rows), made.plan())
    assert len(page.encode()) < 1_500_000


def test_the_trace_nests_and_counts(tmp_path: Path) -> None:
    events = json.loads(draw(tmp_path / "a", "trace", None, made.plan()))["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    for lane in (1, 2):
        spans = [e for e in events if e["ph"] == "X" and e["pid"] == lane]
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(spans))
    planned = [e["args"]["bytes"] for e in events if e["ph"] == "C" and e["pid"] == 2]
    assert planned == [4096, 12288, 10240, 2048, 0]


@pytest.mark.parametrize("damage", [
    {"choice": 3}, {"choice": {"binding": 4, "estimated": []}, "rounds": [None, {"measured": 1}]},
    {"estimates": []}, {"environment": None}, {"budget": [1]}, {"seed": "x"}, {"front": [[]]},
    {"layers": [made.layer("a", candidates=[4, {"format": []}], option=7, why=[], runner_up={})]},
    {"layers": []}, {"recipe_toml": {}}, {"notes": [3]},
    {"quality": {**made.report()["quality"], "baseline": None}},
    {"notes": {}}, {"training": {"layers": 4}},
    {"steps": [made.step(stats=3)]},
    {"steps": [made.step(stats={"weight_error": [], "zeros_of": 4})]},
    {"steps": [made.step(stats={"weight_error": {"a": "x"}, "zeros_of": {"a": []}})]},
])  # fmt: skip
def test_what_only_some_reports_have_may_be_anything(
    tmp_path: Path, damage: dict[str, Any]
) -> None:
    folder = made.write_artifact(tmp_path / "a", made.report(**damage))
    for form in ("html", "md", "trace", "json"):
        assert render(folder, form)


@pytest.mark.parametrize("memory", [
    {}, {"buffers": 3}, {"buffers": [{"lower": 5, "upper": 1, "bytes": 3}]},
    {"buffers": [{"lower": 0, "upper": 2**53, "bytes": 2**53, "where": "arena", "offset": 2**53}]},
    {"steps": [4], "buffers": [{"lower": 0, "upper": 1, "bytes": 1, "where": [], "offset": -1}]},
])  # fmt: skip
def test_a_plan_may_be_anything(tmp_path: Path, memory: dict[str, Any]) -> None:
    folder = made.write_artifact(tmp_path / "a", None, memory)
    for form in ("html", "trace"):
        assert render(folder, form)


def test_the_page_goes_beside_the_artifact(mopt: Call, place: Path) -> None:
    made.write_artifact(place / "a")
    done = mopt("report", "a")
    assert (done.code, done.out) == (0, "Wrote a/report.html\n")
    assert "<!doctype html>" in (place / "a" / "report.html").read_text()
    assert mopt("report", "a", "--format", "md").out.startswith("### char-lm")
    assert mopt("report", "a", "--format", "json").document["model"] == "char-lm"
    assert mopt("report", "a", "--json").document["report"] == "a/report.html"


def test_a_link_in_the_artifact_is_not_followed(mopt: Call, place: Path) -> None:
    made.write_artifact(place / "a")
    (place / "mine").write_text("precious")
    (place / "a" / "report.html").symlink_to(place / "mine")
    done = mopt("report", "a")
    assert done.code == 2 and "output-is-link" in done.err
    assert (place / "mine").read_text() == "precious"


def test_errors_of_report(mopt: Call, place: Path) -> None:
    (place / "empty").mkdir()
    assert "error[no-report]" in mopt("report", "empty").err
    made.write_artifact(place / "a")
    assert "error[open-what]" in mopt("report", "a", "--format", "md", "--open").err
    assert "error[two-formats]" in mopt("report", "a", "--format", "md", "--json").err
    huge = made.report(result=made.side(3, 1.7976931348623157e308))
    made.write_artifact(place / "b", huge)
    done = mopt("report", "b")
    assert done.code == 2 and "error[malformed-report]" in done.err
    untimed = made.report(baseline=made.side(3, None))
    made.write_artifact(place / "c", untimed)
    assert "baseline.latency_ms.measured is missing" in mopt("report", "c").err


def test_a_step_that_says_nonsense_is_shown_without_it(tmp_path: Path) -> None:
    report = made.report()
    report["steps"][0]["changed"] = ["changed"]
    page = render(made.write_artifact(tmp_path / "a", report), "html")
    assert "quantize-dynamic" in page and "<td>changed</td>" not in page
