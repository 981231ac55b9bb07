"""Progress: lines for logs, a moving line for people, silence on request."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest

from mopt.cli import _progress
from mopt.cli._output import Output
from mopt.cli._progress import ConsoleProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_log_gets_one_line_a_stage_with_its_time() -> None:
    err = io.StringIO()
    with ConsoleProgress(Output(stdout=io.StringIO(), stderr=err)) as progress:
        progress.stage("Capturing", "net")
        progress.step(1, 2, "layers")
        progress.end("net, 100 %")
        progress.stage("Lowering")
        progress.end("onnx")
    lines = err.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["Capturing", "Lowering"]
    assert "net, 100 %" in lines[0]
    assert lines[0].endswith(" s")


def test_a_long_stage_says_in_a_log_that_it_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "STILL_WORKING_EVERY", 0.1)
    err = io.StringIO()
    with ConsoleProgress(Output(stdout=io.StringIO(), stderr=err)) as progress:
        progress.stage("Calibrating")
        progress.step(14, 32, "blocks")
        wait_for(lambda: "still working" in err.getvalue())
    assert "still working: 14 of 32 blocks" in err.getvalue()
    assert "\r" not in err.getvalue()
    assert "\x1b" not in err.getvalue()


def test_what_is_counted_to_the_end_is_not_shown_as_if_it_went_on() -> None:
    err = Terminal()
    with ConsoleProgress(Output(stdout=io.StringIO(), stderr=err)) as progress:
        progress.stage("Checking", "quality")
        progress.step(1, 2, "batches")
        wait_for(lambda: "1 of 2 batches" in err.getvalue())
        progress.step(2, 2, "batches")
        drawn = len(err.getvalue())
        wait_for(lambda: "quality" in err.getvalue()[drawn:])
        assert "2 of 2" not in err.getvalue()


def test_a_terminal_gets_a_moving_line_and_then_the_finished_one() -> None:
    err = Terminal()
    with ConsoleProgress(Output(stdout=io.StringIO(), stderr=err)) as progress:
        progress.stage("Lowering", "onnx")
        progress.step(3, 9, "layers")
        wait_for(lambda: "3 of 9 layers" in err.getvalue())
        progress.say("a pass \x1b[31m")
        progress.end("9 of 9")
    text = err.getvalue()
    assert "\x1b[2K" in text  # redrawn in place
    assert "a pass \\x1b[31m" in text
    assert "Lowering     9 of 9" in text.splitlines()[-1]


@pytest.mark.parametrize("variable", ["MOPT_NO_PROGRESS", "TERM"])
def test_nothing_moves_where_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "dumb")
    err = Terminal()
    with ConsoleProgress(Output(stdout=io.StringIO(), stderr=err)) as progress:
        progress.stage("Lowering")
        progress.step(3, 9, "layers")
        time.sleep(0.4)
        progress.end("done")
    assert "\x1b" not in err.getvalue()
    assert err.getvalue().startswith("Lowering     done")


def test_quiet_says_nothing() -> None:
    err = Terminal()
    with ConsoleProgress(Output(quiet=True, stdout=io.StringIO(), stderr=err)) as progress:
        progress.stage("Lowering")
        progress.end("done")
    assert err.getvalue() == ""


def test_no_bar_outlives_an_error() -> None:
    err = Terminal()
    out = Output(stdout=io.StringIO(), stderr=err)
    with pytest.raises(ValueError, match="broken"), ConsoleProgress(out) as progress:
        progress.stage("Lowering")
        raise ValueError("broken")
    length = len(err.getvalue())
    time.sleep(0.6)
    assert len(err.getvalue()) == length
    assert out.doing == "Lowering"  # what a message about a defect says
