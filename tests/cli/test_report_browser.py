"""The page of a report in a real browser: it renders, sorts, filters, and complains about nothing.

``MOPT_SCREENSHOTS=folder`` keeps pictures of it, for whoever changes how it looks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mopt.cli.report import render
from tests.browser import Browser, find_browser
from tests.cli import report_fixture as made

PATH = find_browser()
pytestmark = pytest.mark.skipif(PATH is None, reason="no Chromium: apt-get install chromium")
COLUMNS = ["path", "kind", "shape", "format", "before", "after"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PATH is not None
    with Browser(PATH) as opened:
        yield opened


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A report of 200 layers with everything a report may have, one name hostile."""
    rows = [made.layer(f"blocks.{i}.mlp", i, option="int8", why="cheapest",
                       candidates=made.candidates(8)) for i in range(199)]  # fmt: skip
    rows.append(made.layer(made.HOSTILE, 500))
    choice = {"choice": {"binding": ["size"], "minimize": "loss", "estimated": {"loss": 0.1}},
              "rounds": [{"measured": {"size": 4e6, "loss": 0.01}, "estimated": {"loss": 0.02}},
                         {"measured": {"size": 2_940_000, "loss": 0.02}}]}  # fmt: skip
    data = made.report(rows, training=made.training(), **choice)
    folder = made.write_artifact(tmp_path / "a", data, made.plan())
    (tmp_path / "report.html").write_text(render(folder, "html"))
    return tmp_path / "report.html"


def paths(browser: Browser) -> list[str]:
    """The layers that are shown, in their order."""
    script = """Array.from(document.querySelectorAll('#layers tbody tr:not([hidden])'))
        .map(row => row.cells[0].firstChild.textContent)"""
    found: list[str] = browser.run(script)
    return found


def click(browser: Browser, selector: str) -> None:
    browser.run(f"document.querySelector({selector!r}).click()")


def test_sorts_filters_and_explains(browser: Browser, page: Path) -> None:
    browser.look()
    browser.open(page)
    assert len(paths(browser)) == 200
    after = COLUMNS.index("after") + 1
    click(browser, f"#layers th:nth-child({after}) button")
    assert paths(browser)[:2] == [made.HOSTILE, "blocks.198.mlp"]
    click(browser, f"#layers th:nth-child({after}) button")
    assert paths(browser)[0] == "blocks.0.mlp"
    browser.run("""(() => { const s = document.getElementById('search'); s.value = 'blocks.19';
        s.dispatchEvent(new Event('input')); })()""")
    assert len(paths(browser)) == 10  # 19 and 190 to 198
    browser.run("""(() => { const s = document.getElementById('format'); s.value = 'int8';
        s.dispatchEvent(new Event('change')); })()""")
    assert len(paths(browser)) == 5
    assert browser.run("document.getElementById('shown').textContent") == "5 of 200 layers"
    click(browser, "#layers tbody tr:not([hidden]) button.more")
    told = browser.run("document.querySelector('.detail').textContent")
    assert "Why: cheapest" in told and "refused: no kernel on cpu" in told
    fragment = browser.run("location.hash")
    browser.open(page, fragment)
    assert len(paths(browser)) == 5  # a view can be linked
    assert browser.errors == []


def test_a_name_is_text_whatever_it_says(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("document.title") == "char-lm - mopt report"
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert made.HOSTILE in paths(browser)
    assert browser.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_every_screen_shows_all_of_it(browser: Browser, page: Path, dark: bool, width: int) -> None:
    browser.look(width=width, dark=dark)
    browser.open(page)
    headings = browser.run("Array.from(document.querySelectorAll('h2')).map(h => h.textContent)")
    assert headings == ["Trade-off", "Layers", "Memory over time", "Training step",
                        "Estimated against measured", "Steps", "Coverage",
                        "Environment, and how to repeat it"]  # fmt: skip
    # Nothing but tables and pictures may need to be moved sideways.
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert _contrast(browser, "body") >= 4.5
    assert _contrast(browser, ".soft") >= 4.5
    assert browser.errors == []
    kept = os.environ.get("MOPT_SCREENSHOTS")
    if kept:
        browser.screenshot(Path(kept) / f"report-{width}-{'dark' if dark else 'light'}.png")


def _contrast(browser: Browser, selector: str) -> float:
    """The ratio of an element's colour to that of the page, by WCAG 2.1."""
    script = f"""['color', 'background-color'].map((what, i) => getComputedStyle(
        document.querySelector(i ? 'body' : {selector!r}))[what].match(/[\\d.]+/g).map(Number))"""
    ink, paper = (_luminance(color) for color in browser.run(script))
    return (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)


def _luminance(color: list[Any]) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (part / 255 for part in color[:3])
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
