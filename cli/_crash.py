"""What a user gets when mopt itself is wrong: a file to attach, and a message that says so."""

from __future__ import annotations

import platform
import shlex
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mopt.errors import InternalError, quote

_PACKAGES = ("mopt", "torch", "onnx", "onnxruntime", "onnxscript", "onnx-ir", "numpy",
             "transformers", "click", "rich")  # fmt: skip


def defect(error: BaseException, arguments: Sequence[str], doing: str) -> InternalError:
    """The error to show for an exception that mopt did not raise on purpose."""
    frames = traceback.extract_tb(error.__traceback__)
    site = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    stage = f" while {doing.lower()}" if doing else ""
    file = write_crash_file(error, arguments)
    return InternalError(
        f"mopt failed{stage}: {type(error).__name__}: {quote(str(error), 300)}",
        code="internal",
        site=site,
        hint=(
            "this is a defect of mopt, not of your model. Please report it with the file\n"
            f"        {file} (versions, command and traceback; no weights)\n"
            f"        and, if you can, the model. To repeat it: {_command(arguments)}"
        ),
    )


def write_crash_file(error: BaseException, arguments: Sequence[str]) -> Path:
    """A text file in the temporary folder with what a maintainer needs; its path."""
    lines = [f"command: {_command(arguments)}", f"python: {platform.python_version()}",
             f"platform: {platform.platform()}"]  # fmt: skip
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            lines.append(f"{name}: {version(name)}")
    lines += ["", *traceback.format_exception(error)]
    with tempfile.NamedTemporaryFile(
        "w", prefix="mopt-crash-", suffix=".txt", delete=False, encoding="utf-8",
        errors="backslashreplace",
    ) as file:  # fmt: skip
        file.write("\n".join(lines))
    return Path(file.name)


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["mopt", *arguments])
