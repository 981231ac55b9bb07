"""Run a command in its own process group, with bounded time, memory and output.

Work that may crash, hang or fill the machine (loading strangers' models, timing) runs here, so
that the worst it can do to the caller is an error with a name.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mopt.errors import ArtifactError, InputError, LimitError, MoptError, quote
from mopt.limits import DEFAULT_LIMITS

_TAIL_BYTES = 4000
_TAIL_LINES = 12
_GRACE_SECONDS = 1.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class ChildResult:
    """What a child printed on stdout, the end of its stderr, and how long it ran."""

    stdout: bytes
    stderr_tail: str
    seconds: float


def run_child(
    command: Sequence[str],
    *,
    label: str,
    timeout: float,
    max_output: int = DEFAULT_LIMITS.child_output,
    max_memory: int | None = None,
    env: Mapping[str, str] | None = None,
) -> ChildResult:
    """Run ``command`` to its end; whatever happens, nothing of its process group is left.

    ``max_memory`` bounds its private memory in bytes (``RLIMIT_DATA``: mapped files do not
    count); ``env`` is added to the environment. ``label`` is what messages call it.

    Raises LimitError ``child-timeout`` or ``child-output``, ArtifactError ``child-crashed`` (a
    signal, named) or ``child-failed`` (an exit status, with the end of its stderr), and InputError
    ``child-not-started``.
    """
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    except OSError as e:
        raise InputError(
            f"{label}: cannot start {quote(command[0])}: {e.strerror}", code="child-not-started"
        ) from e
    try:
        if max_memory is not None:
            with suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_DATA, (max_memory, max_memory))
        stdout, stderr, stopped = _collect(process, started + timeout, max_output)
    finally:
        # Before it is reaped, so that the group's number cannot belong to anybody else.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    tail = _printable_tail(stderr)
    if stopped is not None:
        raise _stopped_error(stopped, label, timeout, max_output, tail)
    if process.returncode:
        raise _exit_error(process.returncode, label, tail)
    return ChildResult(stdout, tail, time.monotonic() - started)


def _collect(
    process: subprocess.Popen[bytes], deadline: float, max_output: int
) -> tuple[bytes, bytes, str | None]:
    """Read both pipes until the child ends; gives stdout, stderr's end, and what stopped it."""
    assert process.stdout is not None and process.stderr is not None
    stdout, stderr = bytearray(), bytearray()
    ended_at: float | None = None
    with selectors.DefaultSelector() as pipes:
        pipes.register(process.stdout, selectors.EVENT_READ, stdout)
        pipes.register(process.stderr, selectors.EVENT_READ, stderr)
        while True:
            now = time.monotonic()
            if ended_at is None and _has_ended(process.pid):
                ended_at = now
            # A grandchild may hold the pipes open for ever: it gets a moment, then it is killed.
            if ended_at is not None and (not pipes.get_map() or now > ended_at + _GRACE_SECONDS):
                return bytes(stdout), bytes(stderr), None
            if now >= deadline:
                return bytes(stdout), bytes(stderr), "timeout"
            if not pipes.get_map():
                time.sleep(0.002)
                continue
            for key, _ in pipes.select(min(_POLL_SECONDS, deadline - now)):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    pipes.unregister(key.fileobj)
                key.data.extend(chunk)
            del stderr[:-_TAIL_BYTES]
            if len(stdout) > max_output:
                return bytes(stdout), bytes(stderr), "output"


def _has_ended(pid: int) -> bool:
    """Whether the child is over, without reaping it."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, flags) is not None


def _printable_tail(stderr: bytes) -> str:
    """The last lines, with everything that could steer a terminal shown as an escape."""
    text = stderr[-_TAIL_BYTES:].decode("utf-8", "backslashreplace")
    lines = [line for line in text.splitlines() if line.strip()][-_TAIL_LINES:]
    return "\n".join(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        for line in lines
    )


def _with_tail(message: str, tail: str) -> str:
    if not tail:
        return message
    return f"{message}; it printed:\n" + "\n".join(f"    {line}" for line in tail.splitlines())


def _stopped_error(
    stopped: str, label: str, timeout: float, max_output: int, tail: str
) -> LimitError:
    if stopped == "output":
        return LimitError(
            _with_tail(f"{label} printed more than {max_output} bytes and was stopped", tail),
            code="child-output",
        )
    return LimitError(
        _with_tail(f"{label} did not end within {timeout:.3g} s and was stopped", tail),
        code="child-timeout",
    )


def _exit_error(returncode: int, label: str, tail: str) -> MoptError:
    if returncode > 0:
        return ArtifactError(
            _with_tail(f"{label} failed with exit status {returncode}", tail), code="child-failed"
        )
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = "the machine may be out of memory" if name == "SIGKILL" else None
    return ArtifactError(
        _with_tail(f"{label} died of {name}", tail), code="child-crashed", hint=hint
    )
