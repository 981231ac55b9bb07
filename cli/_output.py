"""Where a command's words go: data to stdout, everything else to stderr, nothing raw to either."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import click

from mopt.cli._text import safe, safe_lines

if TYPE_CHECKING:
    from rich.console import Console

    from mopt.errors import MoptError

# Tables that nobody watches are never folded: one row stays one line for grep and awk.
_UNLIMITED = 10_000
_NARROW = 60
_STDOUT, _STDERR = 1, 2


@dataclass(frozen=True)
class Column:
    """One column of a table; numbers go to the right."""

    name: str
    right: bool = False


@dataclass
class Output:
    """The streams of one command and how talkative it is. Every method escapes what it prints.

    ``doing`` is the stage that runs, for the message about a defect.
    """

    verbose: int = 0
    quiet: bool = False
    as_json: bool = False
    color: str = "auto"
    doing: str = ""
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)
    _document_written: bool = False

    # ---- stdout

    def text(self, text: str = "", *, bold: bool = False) -> None:
        """Lines of the answer."""
        self._write(self._style(safe_lines(text), self.stdout, bold=bold) + "\n")

    def document(self, data: Any) -> None:
        """The one JSON document of a command run with --json."""
        self._document_written = True
        self._write(json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        """A table without lines; ``name: value`` blocks where the terminal is too narrow."""
        from rich.table import Table

        console = self.console(self.stdout)
        if console.width < _NARROW or (console.is_terminal and console.is_dumb_terminal):
            for row in rows:
                self.text("\n".join(
                    f"{column.name}: {cell}" if column.name else cell
                    for column, cell in zip(columns, row, strict=True) if cell
                ) + "\n")  # fmt: skip
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in columns:
            table.add_column(safe(column.name), justify="right" if column.right else "left")
        for row in rows:
            table.add_row(*(safe(cell) for cell in row))
        with console.capture() as captured:
            console.print(table)
        # Padding on the right would show up as trailing blanks in every log.
        self._write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def _write(self, text: str) -> None:
        try:
            self.stdout.write(text)
            self.stdout.flush()
        except BrokenPipeError:
            # The reader has seen enough; the command still finishes and keeps its exit code.
            silence(self.stdout)

    # ---- stderr

    def note(self, text: str) -> None:
        """Something worth knowing, not with -q."""
        if not self.quiet:
            self.stderr.write(safe_lines(text) + "\n")

    def warn(self, text: str) -> None:
        """Something the user may want to act on."""
        mark = self._style("warning", self.stderr, fg="yellow", bold=True)
        self.stderr.write(f"{mark}: {safe_lines(text)}\n")

    def error(self, error: MoptError) -> None:
        """An error in its one form: code, message, site, hint."""
        mark = self._style(f"error[{safe(error.code)}]", self.stderr, fg="red", bold=True)
        self.stderr.write(f"{mark}: {safe_lines(error.message)}\n")
        if error.site:
            self.stderr.write(f"  at {safe(error.site)}\n")
        if error.hint:
            self.stderr.write(f"\n  hint: {safe_lines(error.hint)}\n")
        if self.as_json and not self._document_written:
            fields = ("code", "message", "site", "hint")
            with suppress(OSError):  # the error may be that stdout is full
                self.document({"error": {name: getattr(error, name) for name in fields}})

    # ---- terminals

    def console(self, stream: TextIO) -> Console:
        """A rich console on one of the streams that never reads markup from what it is given."""
        from rich.console import Console

        return Console(
            file=stream,
            width=None if stream.isatty() else _UNLIMITED,
            markup=False,
            highlight=False,
            emoji=False,
            no_color=not self._colored(stream),
            force_terminal=True if self.color == "always" else None,
        )

    def _colored(self, stream: TextIO) -> bool:
        if self.color != "auto":
            return self.color == "always"
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return stream.isatty() and not plain

    def _style(self, text: str, stream: TextIO, **style: Any) -> str:
        return click.style(text, **style) if any(style.values()) and self._colored(stream) else text

    # ---- the user's code

    @contextmanager
    def user_code(self) -> Iterator[None]:
        """While the block runs, what the user's model prints goes to stderr, C code's too."""
        flush(sys.stdout)
        kept, own = sys.stdout, self.stdout
        saved = os.dup(_STDOUT)
        os.dup2(_STDERR, _STDOUT)
        if _leads_to(own, _STDOUT):
            self.stdout = os.fdopen(os.dup(saved), "w", encoding=own.encoding, errors=own.errors)
        sys.stdout = sys.stderr
        try:
            with self._libraries_as_talkative():
                yield
        finally:
            sys.stdout = kept
            if self.stdout is not own:
                flush(self.stdout)
                with suppress(OSError):
                    self.stdout.close()
                self.stdout = own
            os.dup2(saved, _STDOUT)
            os.close(saved)

    @contextmanager
    def _libraries_as_talkative(self) -> Iterator[None]:
        """Warnings of libraries about themselves only with -v, their log lines with -vv."""
        with warnings.catch_warnings(), self._library_logs():
            if not self.verbose:
                for category in (FutureWarning, DeprecationWarning):
                    warnings.simplefilter("ignore", category)
                warnings.filterwarnings("ignore", module=r"(torch|onnx\w*|transformers)\b")
            yield

    @contextmanager
    def _library_logs(self) -> Iterator[None]:
        if self.verbose < 2:
            yield
            return
        root, shown = logging.getLogger(), logging.StreamHandler(self.stderr)
        # What mopt logs of itself is printed as stages and warnings already.
        shown.addFilter(lambda record: record.name.split(".")[0] != "mopt")
        level = root.level
        root.addHandler(shown)
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            root.removeHandler(shown)
            root.setLevel(level)


def _leads_to(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError):  # a stream in memory, as in a notebook
        return False


def flush(stream: TextIO) -> None:
    """Flush; a stream that cannot take more is silenced."""
    try:
        stream.flush()
    except (OSError, ValueError):
        silence(stream)


def silence(stream: TextIO) -> None:
    """Let a stream that cannot be written to lead nowhere, so that leaving Python says nothing."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
