"""The site: every error code has a heading where troubles are told, and the pages can be built."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there for its own module
    spec.loader.exec_module(module)
    return module


def test_every_error_code_has_a_heading_and_no_other(hooks: ModuleType) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    built = hooks.on_page_markdown(page, None)
    assert hooks.MARK not in built
    headings = re.findall(r"^### (.+)$", built, re.MULTILINE)
    assert len(headings) == len(set(headings))
    raised: set[str] = set()
    for folder in hooks.SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            raised |= set(re.findall(r'\bcode="([a-z0-9-]+)"', path.read_text()))
    assert raised <= set(headings)
    assert {"unknown-pass", "csv-header", "budget-not-met", "max-minutes"} <= set(headings)
    # Headings come from calls and constants only: what is not one of these texts is a mistake.
    sources = "".join(
        path.read_text() for folder in hooks.SOURCES for path in (ROOT / folder).rglob("*.py")
    )
    made = {code for code in headings if code.startswith("unknown-")}
    assert all(f'"{code}"' in sources for code in set(headings) - made)


def test_what_an_error_says_is_told(hooks: ModuleType) -> None:
    page = hooks.troubles()
    part = page.split("### disk-full")[1].split("###")[0]
    assert "no space is left on the disk" in part and "free some space" in part


def test_pages_from_docstrings_name_everything(hooks: ModuleType) -> None:
    from mopt.registry import list_passes

    passes = hooks.passes_page()
    assert re.findall(r"^## (\S+)$", passes, re.MULTILINE) == sorted(list_passes())
    assert "| `decimals` |" not in passes and "| `layers` |" in passes
    assert "`int4-g32" in hooks.formats_page()
    assert "| `h200` |" in hooks.devices_page()
    commands = hooks.commands_page()
    assert "## mopt compile\n" in commands and "## mopt cache prune\n" in commands
    assert "## compile\n" in hooks.python_page()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="pip install 'mopt[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "troubleshooting" / "index.html").is_file()
