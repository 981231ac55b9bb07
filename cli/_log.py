"""What a command did, line by line, for the artifact: stages, passes, and what libraries said."""

from __future__ import annotations

import logging
import site
import sys
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from mopt.cli._output import Output
from mopt.cli._text import safe

NAME = "log.txt"
_OWN = "mopt"
_MOST_CHARACTERS = 1_000_000


class Log(logging.Handler):
    """While open: keeps what is logged and warned of, paths made relative.

    Warnings of mopt itself are shown to the user too; those of libraries are only kept.
    """

    def __init__(self, out: Output) -> None:
        super().__init__(logging.DEBUG)
        self._out = out
        self._started = time.monotonic()
        self._lines: list[str] = []
        self._characters = 0
        self._left_out = 0
        self._places = _places()

    def text(self) -> str:
        """All lines, and how many there was no room for."""
        more = [f"{self._left_out} more lines left out"] if self._left_out else []
        return "\n".join([*self._lines, *more, ""])

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._add(record.levelname, record.name, message)
        if record.name.split(".")[0] == _OWN and record.levelno >= logging.WARNING:
            self._out.warn(message)

    def _add(self, level: str, name: str, message: str) -> None:
        for place, short in self._places:
            message = message.replace(place, short)
        seconds = time.monotonic() - self._started
        line = f"{seconds:9.3f} {level} {name}: {safe(message)}"
        self._characters += len(line)
        if self._characters > _MOST_CHARACTERS:
            self._left_out += 1
        else:
            self._lines.append(line)

    def _warned(self, message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        self._add("WARNING", category.__name__, f"{message} ({where[0]}:{where[1]})")
        self._show(message, category, *where, **more)

    def __enter__(self) -> Log:
        own = logging.getLogger(_OWN)
        self._kept = own.level
        own.setLevel(logging.DEBUG)
        logging.getLogger().addHandler(self)
        self._show = warnings.showwarning
        warnings.showwarning = self._warned  # type: ignore[assignment]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        warnings.showwarning = self._show
        logging.getLogger(_OWN).setLevel(self._kept)
        logging.getLogger().removeHandler(self)


def _places() -> list[tuple[str, str]]:
    """Folders that tell where and whose a machine is, longest first, with what stands for them."""
    packages = {*site.getsitepackages(), str(Path(__file__).parents[1])}
    found = [(f"{folder}/", "") for folder in packages]
    found += [(f"{Path.cwd()}/", ""), (f"{sys.prefix}/", ""), (f"{Path.home()}/", "~/")]
    return sorted(found, key=lambda place: -len(place[0]))
