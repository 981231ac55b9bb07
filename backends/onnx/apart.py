"""Run an ONNX model in a process of its own, which takes its memory along when it ends.

ONNX Runtime packs the weights it loads into copies of its own. Where a compile has the original in
memory already, the lowered model is compared with it from here. The process imports no torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import mopt.errors
from mopt.bench_loop import die_with_parent
from mopt.disk import scratch_folder
from mopt.errors import ArtifactError, MoptError, UsageError
from mopt.npz_files import read_npz, write_npz

_GIVEN, _FOUND = "given.npz", "found.npz"
_GRACE_SECONDS = 10.0


class ApartRunner:
    """A model loaded in another process: arrays in, arrays out, in the order of the model.

    Raises at once what loading raises there; ArtifactError ``child-crashed`` when it dies.
    """

    def __init__(self, model: Path, threads: int | None) -> None:
        self._scratch, remove = scratch_folder("mopt-apart")
        self._remove = weakref.finalize(self, remove)
        command = [
            sys.executable, "-P", "-m", "mopt.backends.onnx.apart", str(model.resolve()),
            "--threads", str(threads or 0), "--scratch", str(self._scratch),
        ]  # fmt: skip
        self._process: subprocess.Popen[str] | None = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self._answer()
        except MoptError:
            self.close()
            raise

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs for inputs; the errors of ``OnnxRunner.run``."""
        if self._process is None:
            raise UsageError("the model was closed", code="runner-closed", hint="load it again")
        folder = self._scratch
        _keep(folder / _GIVEN, inputs)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            print("run", file=self._process.stdin, flush=True)
        self._answer()
        return _arrays(folder / _FOUND)

    def close(self) -> None:
        """End the process. May be called again."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(subprocess.TimeoutExpired, ValueError):
                process.communicate(timeout=_GRACE_SECONDS)
            process.kill()
            process.wait()
            self._remove()

    def _answer(self) -> None:
        """Wait for the process; raise what it says went wrong."""
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self.close()
            raise ArtifactError(
                f"the process that runs the lowered model ended with status {status}",
                code="child-crashed",
                hint="a negative status is a signal; 9 is mostly a lack of memory",
            )
        answer: dict[str, Any] = json.loads(line)
        if answer:
            raise getattr(mopt.errors, answer.pop("kind"))(answer.pop("message"), **answer)


def _keep(path: Path, arrays: Sequence[np.ndarray]) -> None:
    write_npz(path, {str(index): array for index, array in enumerate(arrays)})


def _arrays(path: Path) -> list[np.ndarray]:
    return list(read_npz(path).values())


def main() -> int:
    """The process: loads, then runs once for each line it reads, until there are no more."""
    from mopt.backends.onnx.session import open_session

    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m mopt.backends.onnx.apart")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    given = parser.parse_args()
    try:
        runner = open_session(given.model, threads=given.threads)
    except MoptError as error:
        _say(error)
        return 0
    _say(None)
    for _ in sys.stdin:
        try:
            _keep(given.scratch / _FOUND, runner.run(_arrays(given.scratch / _GIVEN)))
        except MoptError as error:
            _say(error)
        else:
            _say(None)
    return 0


def _say(error: MoptError | None) -> None:
    answer = {} if error is None else {
        "kind": type(error).__name__, "message": error.message, "code": error.code,
        "hint": error.hint, "site": error.site,
    }  # fmt: skip
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.exit(main())
