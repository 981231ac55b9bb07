"""Progress on stderr: a line per finished stage, a bar while one runs and somebody watches."""

from __future__ import annotations

import logging
import os
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from mopt.cli._output import Output
from mopt.cli._text import safe, seconds
from mopt.pass_base import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

STILL_WORKING_EVERY = 30.0
_log = logging.getLogger("mopt.stages")
_STAGE_WIDTH = 12
_DETAIL_WIDTH = 62


class ConsoleProgress(Progress):
    """Says how far a command is; use it in a ``with`` so that no bar outlives an error.

    On a terminal the running stage is shown at once and its bar after a second, redrawn in place.
    Elsewhere a stage that takes long says every 30 seconds that it is still working. With -q or
    ``MOPT_NO_PROGRESS`` nothing moves.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        moving = not out.quiet and not os.environ.get("MOPT_NO_PROGRESS")
        terminal = out.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._live = moving and terminal
        self._remind = moving and not terminal
        self._lock = threading.Lock()
        self._stage: str | None = None
        self._detail = ""
        self._started = 0.0
        self._steps: tuple[int, int, str] | None = None
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stop = threading.Event()
        self._clock: threading.Thread | None = None

    # ---- what the driver calls

    def stage(self, name: str, detail: str = "") -> None:
        """A stage begins; one that did not end before counts as ended."""
        if self._stage is not None:
            self.end()
        self._out.doing = name
        with self._lock:
            self._stage, self._started, self._steps = name, time.monotonic(), None
            self._detail = detail
            if self._live:
                self._show()
        if self._live or self._remind:
            self._stop = threading.Event()
            self._clock = threading.Thread(
                target=self._tick, args=(self._stop,), name="mopt-progress", daemon=True
            )
            self._clock.start()

    def step(self, done: int, total: int, unit: str) -> None:
        """``done`` of ``total`` items of the stage are finished; all of them: they are no more
        what it is at.
        """
        with self._lock:
            self._steps = (done, total, unit) if done < total else None

    def end(self, detail: str = "") -> None:
        """The stage is finished: its one line is printed."""
        if self._stage is None:
            return
        took = seconds(time.monotonic() - self._started)
        name = self._stage
        self.close()
        _log.info("%s: %s (%s)", name, detail, took)
        self._out.note(f"{name:<{_STAGE_WIDTH}} {detail:<{_DETAIL_WIDTH}} {took:>8}")

    # ---- life

    def close(self) -> None:
        """Stop the clock and take the bar away."""
        self._stop.set()
        if self._clock is not None and self._clock is not threading.current_thread():
            self._clock.join()
        self._clock = None
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
            self._bar = self._task = self._stage = None

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- what is seen

    def say(self, text: str) -> None:
        """A line of its own while a stage runs, above the bar."""
        bar = self._bar
        if bar is not None:
            bar.console.print(safe(text), soft_wrap=True)
        else:
            self._out.note(text)

    def _show(self) -> None:
        from mopt.cli._bar import make_bar

        self._bar = make_bar(self._out.console(self._out.stderr), _STAGE_WIDTH)
        self._task = self._bar.add_task(
            "", total=None, stage=safe(self._stage or ""), detail=safe(self._detail), counts=False
        )
        self._bar.start()

    def _tick(self, stop: threading.Event) -> None:
        next_word = STILL_WORKING_EVERY
        while not stop.wait(0.25):
            elapsed = time.monotonic() - self._started
            with self._lock:
                if stop.is_set():
                    return
                if self._bar is not None and self._task is not None:
                    self._redraw()
                elif self._remind and elapsed >= next_word:
                    next_word += STILL_WORKING_EVERY
                    self._out.note(f"  still working: {self._position()}, {seconds(elapsed)}")

    def _redraw(self) -> None:
        assert self._bar is not None and self._task is not None
        done, total, _ = self._steps or (0, None, "")
        self._bar.update(
            self._task, completed=done, total=total, detail=safe(self._position()),
            counts=total is not None,
        )  # fmt: skip

    def _position(self) -> str:
        if self._steps is None:
            return self._detail or self._stage or ""
        done, total, unit = self._steps
        return f"{done} of {total} {unit}"
