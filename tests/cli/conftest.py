"""Fixtures of the tests of the command line: an empty folder, a model in a file, a call."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mopt.cli.main import run
from tests.cli.command_line import NET, Call, Result


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in list(os.environ):
        if name.startswith("MOPT_") or name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def mopt(place: Path, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run a command line in this process: ``mopt("models", "list")``."""

    def call(*arguments: str) -> Result:
        capfd.readouterr()
        code = run(arguments)
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture
def net(place: Path) -> str:
    """The name of a small model in a file of the current folder."""
    (place / "net.py").write_text(NET)
    return "net.py:factory"
