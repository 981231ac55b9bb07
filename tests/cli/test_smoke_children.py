"""mopt check --smoke with several models at a time; the children are replaced by short scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mopt.cli import _smoke_children
from tests.cli.command_line import Call

CONFIG = "".join(f'[models.{name}]\nmodel = "net.py:{name}"\n' for name in "abcde")
CHILD = """
import json, os, sys
names, dying = sys.argv[2:], sys.argv[1]
if dying in names:
    os.abort()
rows = [{"name": n, "error": "no" * (n == "c"), "notes": ["small"], "seconds": 1} for n in names]
print(json.dumps({"models": rows, "github": os.environ.get("GITHUB_STEP_SUMMARY")}))
"""


@pytest.fixture
def children(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The shares that were started, in order; a child with the model d dies."""
    (place / "mopt.toml").write_text(CONFIG)
    shares: list[list[str]] = []

    def command(names: Sequence[str], config: Path, keep: Path | None) -> list[str]:
        assert config.is_absolute()
        shares.append(list(names))
        return [sys.executable, "-c", CHILD, "d", *names]

    monkeypatch.setattr(_smoke_children, "_command", command)
    return shares


def test_a_dead_child_is_tried_model_by_model(mopt: Call, children: list[list[str]]) -> None:
    done = mopt("check", "--smoke", "--jobs", "2", "--json")
    assert done.code == 1
    told = {row["name"]: row["error"] for row in done.document["models"]}
    assert told == {"a": None, "b": None, "c": "no", "d": "the check died of SIGABRT", "e": None}
    assert children == [["a", "c", "e"], ["b", "d"], ["b"], ["d"]]


def test_sound_models_pass_with_their_notes(mopt: Call, children: list[list[str]]) -> None:
    files = ("--markdown", "summary.md", "--junit", "junit.xml")
    done = mopt("check", "--smoke", "--jobs", "8", *files, "a", "b")
    assert done.code == 0 and "a: small" in done.out
    assert children == [["a"], ["b"]]
    summary = Path("summary.md").read_text()
    assert "- **a**: small" in summary and "All rows" not in summary
    suites = ElementTree.parse("junit.xml").getroot()
    assert [len(suite.findall("testcase")) for suite in suites] == [1, 1]


def test_only_a_smoke_check_takes_several_at_a_time(
    mopt: Call, children: list[list[str]], place: Path
) -> None:
    assert "error[jobs-without-smoke]" in mopt("check", "--jobs", "2").err
    assert children == []


def test_the_command_of_a_child_is_one_that_mopt_takes(
    mopt: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "mopt.toml").write_text('[models.a]\nmodel = "net.py:a"\n')
    given = _smoke_children._command(["a"], place / "mopt.toml", place / "out")
    summary = place / "summary"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    done = mopt(*given[given.index("check") :])
    assert done.code == 0 and json.loads(done.out)["models"][0]["name"] == "a"
