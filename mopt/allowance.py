"""What a compile may take of time and memory, and what it did more cheaply to stay within."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from mopt.errors import LimitError

TIME_IS_UP = "max-minutes"
# Of the machine's memory, where nothing else is said.
_SHARE = 0.8


@dataclass
class Allowance:
    """``deadline`` is on ``time.monotonic``; ``max_memory_bytes`` counts anonymous memory.

    Anonymous memory is what a process holds itself; pages of mapped files do not count. ``notes``
    are the cheaper paths that were taken, for the user; ``stopped`` says what was not done at all.
    """

    deadline: float | None = None
    max_memory_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    stopped: str | None = None

    def seconds_left(self) -> float:
        """Until the deadline; infinity without one."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def fits(self, more_bytes: float) -> bool:
        """Whether that much more memory is within what was allowed, or else what is there."""
        limit = self.max_memory_bytes or _SHARE * machine_memory()
        return anonymous_bytes() + more_bytes <= limit

    def say(self, note: str) -> None:
        """Keep a note once."""
        if note not in self.notes:
            self.notes.append(note)

    def stop(self, why: str, what: str) -> None:
        """Keep that ``what`` and all that follows was left out."""
        self.stopped = f"{why}: {what} and what comes after it were left out"
        self.say(self.stopped)

    def check(self, doing: str) -> None:
        """Raise LimitError when the time is up or more memory is held than allowed."""
        if self.seconds_left() < 0:
            raise LimitError(
                f"time is up while {doing}",
                code=TIME_IS_UP,
                hint="what took long is kept: the same command goes on from there. Or raise "
                "--max-minutes, or use a recipe that calibrates less",
            )
        if self.max_memory_bytes is not None:
            held = anonymous_bytes()
            if held > self.max_memory_bytes:
                raise LimitError(
                    f"mopt holds {held / 1e6:.1f} MB while {doing}, more than the limit of "
                    f"{self.max_memory_bytes / 1e6:.1f} MB",
                    code="max-memory",
                    hint="give fewer or smaller calibration batches, or raise --max-memory",
                )


def anonymous_bytes() -> int:
    """The memory this process holds itself (RssAnon); 0 where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def machine_memory() -> int:
    """Bytes of memory of the machine, or of the group of processes this one may use less with."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return whole
    return min(whole, int(text)) if text.isdigit() else whole
