"""Every error mopt raises on purpose.

    MoptError                 exit 2 unless said otherwise
      UsageError              the call, the option or the configuration is wrong
      InputError              a model, data or file given by the user is wrong
      CaptureError            the model could not be captured
      PassError               a pass refused or broke a promise it made
      LoweringError           the backend cannot express the program
      ArtifactError           an artifact is incomplete, altered or hostile
      LimitError              a limit on size, time or memory was reached
      BudgetNotMet            exit 1: it worked, but not within the budget
      InternalError           exit 3: a defect of mopt

Each error has a stable kebab-case ``code``, a message, an optional ``hint`` and ``site``
(module path, pass, node or source line).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class MoptError(Exception):
    """Base of all errors; ``exit_code`` is what the command line returns for it."""

    exit_code = 2

    def __init__(
        self, message: str, *, code: str, hint: str | None = None, site: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint
        self.site = site

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        if self.site:
            lines.append(f"  at {self.site}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class UsageError(MoptError):
    """The call, an option or a configuration file is wrong."""


class InputError(MoptError):
    """A model, calibration data or a file given by the user is wrong."""


class CaptureError(MoptError):
    """The model could not be captured."""


class PassError(MoptError):
    """A pass refused its input or broke a promise it made."""


class LoweringError(MoptError):
    """The backend cannot express the program."""


class ArtifactError(MoptError):
    """An artifact is incomplete, was altered or is hostile."""


class LimitError(MoptError):
    """A limit on size, time or memory was reached."""


class BudgetNotMet(MoptError):
    """The best artifact found does not meet the budget; it is carried in ``artifact``."""

    exit_code = 1

    def __init__(self, message: str, *, artifact: Any = None, **kwargs: Any) -> None:
        super().__init__(message, code=kwargs.pop("code", "budget-not-met"), **kwargs)
        self.artifact = artifact


class InternalError(MoptError):
    """A defect of mopt itself."""

    exit_code = 3


def quote(value: object, limit: int = 80) -> str:
    """``repr`` of a value, at most ``limit`` characters, for error messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def unknown_name(kind: str, name: str, known: Iterable[str], list_command: str) -> UsageError:
    """The error for a name that nothing is registered under, with the nearest known one."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]!r}? {len(names) - 1} more: {list_command}"
    elif len(names) <= 8:
        hint = f"known: {', '.join(names)}"
    else:
        hint = f"{len(names)} known: {list_command}"
    return UsageError(
        f"no {kind} is called {quote(name)}", code=f"unknown-{kind.replace(' ', '-')}", hint=hint
    )
