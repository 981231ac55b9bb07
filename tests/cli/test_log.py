"""The log of a command: everything in order, paths made relative, warnings of mopt also shown."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

from mopt.cli._log import Log
from mopt.cli._output import Output


def output(**settings: int) -> Output:
    return Output(stdout=io.StringIO(), stderr=io.StringIO(), **settings)


def test_keeps_what_is_logged_and_warned_of(place: Path) -> None:
    out = output()
    library = logging.getLogger("some.library")
    with Log(out) as log, out.user_code():
        logging.getLogger("mopt.compile").debug("fold-constants: changed True in %s", place / "x")
        library.info("not worth a line")
        library.warning("a tensor was copied")
        logging.getLogger("mopt.cache").warning("dropped\x1b[2J")
        warnings.warn("mind the gap", UserWarning, stacklevel=1)
    library.error("after the end")
    lines = log.text().splitlines()
    assert [line.split(" ", 1)[1] for line in (line.strip() for line in lines)][:3] == [
        "DEBUG mopt.compile: fold-constants: changed True in x",
        "WARNING some.library: a tensor was copied",
        r"WARNING mopt.cache: dropped\x1b[2J",
    ]
    assert "mind the gap" in lines[3] and len(lines) == 4
    assert out.stderr.getvalue() == "warning: dropped\\x1b[2J\n"  # type: ignore[attr-defined]
    assert logging.getLogger("mopt").level == logging.NOTSET


def test_a_log_has_an_end() -> None:
    with Log(output()) as log:
        for _ in range(30):
            logging.getLogger("mopt.stages").info("x" * 50_000)
    assert len(log.text()) < 1_100_000
    assert log.text().splitlines()[-1] == "11 more lines left out"


def test_twice_verbose_shows_what_libraries_log() -> None:
    out = output(verbose=2)
    with Log(out), out.user_code():
        logging.getLogger("some.library").info("a detail")
        logging.getLogger("mopt.stages").info("Capturing")
    assert out.stderr.getvalue() == "a detail\n"  # type: ignore[attr-defined]
