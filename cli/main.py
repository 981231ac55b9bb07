"""The ``mopt`` command: the one place that turns errors into words and exit codes.

0 done; 1 a budget or gate is not met; 2 wrong usage or input; 3 a defect of mopt; 130 interrupted;
143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType

import click

from mopt import __version__
from mopt.cli._command import FolderGroup
from mopt.cli._output import Output, flush, silence
from mopt.disk import FULL
from mopt.errors import LimitError, MoptError, UsageError

DONE, USAGE, DEFECT, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143

_HELP = """Make a PyTorch model smaller and faster on a device, within a budget, and prove it.

Start with:  mopt compile zoo:digits-cnn -r int8-static
"""


@click.group(cls=FolderGroup, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="mopt %(version)s")
def cli() -> None:
    pass


def main() -> None:
    """The console entry point."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # replaced by something that is not a text file
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Only SystemExit may come out."""
    out = Output(as_json="--json" in arguments)
    with _Signals() as signals:
        try:
            return _invoke(list(arguments), out)
        except SystemExit:
            raise
        except BaseException as error:
            # A library may have turned the interrupt into an error of its own.
            if signals.code is None:
                return _answer(error, arguments, out)
            out.stderr.write("\nStopped.\n" if signals.code == INTERRUPTED else "\nTerminated.\n")
            return signals.code
        finally:
            flush(out.stdout)
            flush(out.stderr)


def _invoke(arguments: list[str], out: Output) -> int:
    instruction = os.environ.get("_MOPT_COMPLETE")
    if instruction:
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "mopt", "_MOPT_COMPLETE", instruction)
    with cli.make_context("mopt", arguments, obj=out) as ctx:
        cli.invoke(ctx)
    return DONE


def _answer(error: BaseException, arguments: Sequence[str], out: Output) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        out.stderr.write(error.format_message() + "\n")
        return USAGE
    if isinstance(error, BrokenPipeError):
        for stream in (sys.stdout, sys.stderr):
            silence(stream)
        return DONE
    shown = _as_mopt_error(error)
    if shown is None:
        from mopt.cli._crash import defect

        shown = defect(error, arguments, out.doing)
    out.error(shown)
    if out.verbose and (shown is not error or error.__cause__ is not None):
        import traceback

        out.note("\n" + "".join(traceback.format_exception(error)))
    return shown.exit_code


def _as_mopt_error(error: BaseException) -> MoptError | None:
    """The error to show, or None when only a defect of mopt explains it."""
    if isinstance(error, MoptError):
        return error
    if isinstance(error, click.ClickException):
        return _usage_error(error)
    if isinstance(error, MemoryError):
        return LimitError(
            "memory is full",
            code="out-of-memory",
            hint="use smaller example inputs or fewer calibration batches, or a larger machine",
        )
    if isinstance(error, OSError) and error.errno in FULL:
        import tempfile

        where = f" of {error.filename!r}" if error.filename else ""
        return LimitError(
            f"no space is left on the disk{where}",
            code="disk-full",
            hint=f"free some space; temporary files go to {tempfile.gettempdir()}, which TMPDIR "
            "changes",
        )
    return None


def _usage_error(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "mopt"
    message = error.format_message().rstrip(".")
    return UsageError(message[:1].lower() + message[1:], code="usage", hint=f"see {path} --help")


class _Signals:
    """While open: SIGINT and SIGTERM become exceptions, and ``code`` is the exit code they ask for.

    SIGTERM as an exception lets temporary files be removed on the way out.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._old: dict[int, object] = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        raise KeyboardInterrupt

    def __enter__(self) -> _Signals:
        with suppress(ValueError):  # not the main thread: signals are somebody else's
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
