"""Ctrl-C and SIGTERM: an exit code of their own, and nothing half-written."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cli.command_line import NET, start

SLOW = """
import sys, time

def wait(what):
    print("READY", what, file=sys.stderr, flush=True)
    time.sleep(60)

def slow_factory():
    wait("factory")

def slow_evaluate(run):
    wait("evaluate")

def stubborn_evaluate(run):
    try:
        wait("evaluate")
    except BaseException as error:
        raise RuntimeError("a library that makes errors of interrupts") from error
"""


@pytest.mark.parametrize(
    ("arguments", "number", "code", "word"),
    [
        (["net.py:slow_factory"], signal.SIGINT, 130, "Stopped."),
        (["net.py:factory", "--eval", "net.py:slow_evaluate"], signal.SIGINT, 130, "Stopped."),
        (["net.py:factory", "--eval", "net.py:stubborn_evaluate"], signal.SIGINT, 130, "Stopped."),
        (["net.py:factory", "--eval", "net.py:slow_evaluate"], signal.SIGTERM, 143, "Terminated."),
    ],
)
def test_interrupted_compile_leaves_nothing(
    place: Path, arguments: list[str], number: int, code: int, word: str
) -> None:
    Path("net.py").write_text(NET + SLOW)
    scratch = place / "scratch"
    scratch.mkdir()
    process = start(
        "compile", *arguments, "-b", "eager", "-r", "none", "--no-measure",
        env={**os.environ, "TMPDIR": str(scratch)}, cwd=place,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("READY"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.splitlines()[-1] == word
    assert "Traceback" not in err
    assert out == ""
    assert not Path("out").exists()
    assert list(scratch.iterdir()) == []
