"""Children that crash, hang, flood or babble become named errors, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mopt.children import run_child
from mopt.errors import ArtifactError, InputError, LimitError

FAST_PYTHON = [sys.executable, "-I", "-S", "-c"]


def shell(script: str, **options: object) -> object:
    return run_child(["/bin/sh", "-c", script], label="the child", timeout=120, **options)  # type: ignore[arg-type]


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def soon(condition: object, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def test_output_environment_and_stderr() -> None:
    result = run_child(
        ["/bin/sh", "-c", 'echo "$NAME"; echo note >&2'],
        label="x", timeout=120, env={"NAME": "value"},
    )  # fmt: skip
    assert (result.stdout, result.stderr_tail) == (b"value\n", "note")


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_a_signal_is_named(name: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        shell(f"echo 'free(): invalid pointer' >&2; kill -{name[3:]} $$")
    assert caught.value.code == "child-crashed"
    assert f"the child died of {name}" in caught.value.message
    assert "free(): invalid pointer" in caught.value.message


def test_a_failure_shows_the_end_of_what_it_printed() -> None:
    with pytest.raises(ArtifactError) as caught:
        shell("seq 100000 >&2; printf 'last\\033[31m words\\n' >&2; exit 7")
    assert caught.value.code == "child-failed"
    message = caught.value.message
    assert "exit status 7" in message and "100000" in message
    assert "last\\x1b[31m words" in message, "it cannot steer the terminal"
    assert "\n    99000\n" not in message and len(message) < 1500


def test_a_hang_is_ended_with_all_its_children(tmp_path: Path) -> None:
    start = time.monotonic()
    script = f"sleep 100 & echo $! > {tmp_path}/pid; echo started >&2; sleep 100"
    with pytest.raises(LimitError) as caught:
        run_child(["/bin/sh", "-c", script], label="the child", timeout=1.5)
    assert caught.value.code == "child-timeout"
    assert "1.5 s" in caught.value.message and "started" in caught.value.message
    assert time.monotonic() - start < 60
    pid = int((tmp_path / "pid").read_text())
    assert soon(lambda: not is_running(pid))


def test_a_grandchild_that_holds_the_pipe_does_not_hold_us(tmp_path: Path) -> None:
    start = time.monotonic()
    result = shell(f"sleep 100 & echo $! > {tmp_path}/pid; echo done")
    assert result.stdout == b"done\n"  # type: ignore[attr-defined]
    assert time.monotonic() - start < 60
    pid = int((tmp_path / "pid").read_text())
    assert soon(lambda: not is_running(pid))


def test_a_flood_is_stopped() -> None:
    with pytest.raises(LimitError) as caught:
        shell("yes", max_output=10_000)
    assert caught.value.code == "child-output"
    assert len(shell("yes | head -c 9000", max_output=10_000).stdout) == 9000  # type: ignore[attr-defined]


def test_a_flood_of_messages_is_only_cut() -> None:
    tail = shell("yes warning | head -c 3000000 >&2").stderr_tail  # type: ignore[attr-defined]
    assert tail.splitlines()[-1] == "warning" and len(tail) < 4100


def test_a_missing_program() -> None:
    with pytest.raises(InputError) as caught:
        run_child(["/no/such/program"], label="the child", timeout=5)
    assert caught.value.code == "child-not-started"


def test_memory_is_bounded() -> None:
    script = "import time\ntime.sleep(.3)\nx = bytearray(1 << 29)"
    with pytest.raises(ArtifactError) as caught:
        run_child([*FAST_PYTHON, script], label="x", timeout=120, max_memory=1 << 28)
    assert "MemoryError" in caught.value.message
    run_child([*FAST_PYTHON, script], label="x", timeout=120, max_memory=1 << 30)


def test_an_interrupt_kills_the_group(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        if not (tmp_path / "pid").exists():
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            return
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            shell(f"sleep 100 & echo $! > {tmp_path}/pid; wait")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    pid = int((tmp_path / "pid").read_text())
    assert soon(lambda: not is_running(pid))


def test_a_timing_child_dies_with_its_parent(tmp_path: Path) -> None:
    """Even of SIGKILL, which gives the parent no chance to clean up."""
    child = (
        "import os, pathlib, time\n"
        "from mopt.bench_loop import die_with_parent\n"
        "die_with_parent()\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(100)\n"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent])
    pid_file = tmp_path / "pid"
    assert soon(lambda: pid_file.exists() and pid_file.read_text(), 30)
    pid = int(pid_file.read_text())
    assert is_running(pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert soon(lambda: not is_running(pid))
