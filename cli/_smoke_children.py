"""Smoke checks of several models at once: a child of mopt for each share of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mopt.cli._check_output import Checked

# What tells a process that a CI reads it: only the parent speaks to that.
_NOT_FOR_CHILDREN = ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY")
_MOST = 4


def usual_jobs() -> int:
    """How many models to compile at a time: the cores, but no more than four whole models."""
    return min(_MOST, len(os.sched_getaffinity(0)))


def check_in_children(
    names: Sequence[str], config: Path, keep: Path | None, jobs: int
) -> list[Checked]:
    """What came of every model, in the order given.

    A child that dies costs the models of its share another child each, so that one is named.
    """
    shares = [list(names[start::jobs]) for start in range(min(jobs, len(names)))]
    found: dict[str, Checked] = {}
    while shares:
        now, shares = shares[:jobs], shares[jobs:]
        for share, (code, output) in zip(now, _run_all(now, config, keep, jobs), strict=True):
            told = _models(output)
            if told is not None:
                found.update((model.name, model) for model in told)
            elif len(share) > 1:
                shares += [[name] for name in share]
            else:
                found[share[0]] = Checked(share[0], error=f"the check {_ended(code)}")
    return [found[name] for name in names]


def _command(names: Sequence[str], config: Path, keep: Path | None) -> list[str]:
    beside = [] if keep is None else ["--output", str(keep)]
    start = "from mopt.cli.main import main; main()"
    return [
        sys.executable, "-P", "-c", start, "check", "--smoke", "--jobs", "1", "--json",
        "--exit-zero", "--config", str(config), *beside, "--", *names,
    ]  # fmt: skip


def _run_all(
    shares: Sequence[Sequence[str]], config: Path, keep: Path | None, jobs: int
) -> list[tuple[int, bytes]]:
    """Exit codes and outputs; no child is left, whatever happens meanwhile."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    env = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_CHILDREN}
    env.setdefault("OMP_NUM_THREADS", str(threads))
    started: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    try:
        for share in shares:
            output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
            child = subprocess.Popen(
                _command(share, config, keep), stdin=subprocess.DEVNULL, stdout=output, env=env,
                start_new_session=True,
            )  # fmt: skip
            started.append((child, output))
        ended = [(child.wait(), output) for child, output in started]
        return [(code, _whole(output)) for code, output in ended]
    finally:
        for child, output in started:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            output.close()


def _whole(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _models(output: bytes) -> list[Checked] | None:
    try:
        document: Any = json.loads(output)
        return [
            Checked(row["name"], error=row["error"] or "", notes=row["notes"],
                    seconds=row["seconds"])
            for row in document["models"]
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return None


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and no answer"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"
