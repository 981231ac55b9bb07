"""Running what the user wrote: find an object by name, call it, and show his own frames on error.

A reference is ``package.module:name`` or ``path/file.py:name``; ``name`` may have dots.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from operator import length_hint
from pathlib import Path
from types import ModuleType
from typing import Any

from mopt.errors import InputError, MoptError, UsageError, quote, unknown_name

_MOPT_ROOT = str(Path(__file__).parent)
_SHOWN_FRAMES = 8


@dataclass(frozen=True)
class Reference:
    """Where an object of the user is: exactly one of ``file`` and ``module`` is given."""

    text: str
    name: str
    file: Path | None = None
    module: str = ""


def parse_reference(text: str, what: str) -> Reference:
    """Split a reference and see that its file exists; nothing is imported.

    ``what`` is the noun for messages, such as "factory". Raises UsageError ``bad-reference`` or
    InputError ``file-not-found``.
    """
    place, colon, name = text.rpartition(":")
    if not colon and (text.endswith(".py") or "/" in text):
        place = text
    elif not place or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(
            f"{quote(text)} names no {what}",
            code="bad-reference",
            hint=f"write package.module:{what} or path/file.py:{what}",
        )
    if not (place.endswith(".py") or "/" in place):
        return Reference(text, name, module=place)
    file = Path(place)
    if not file.is_file():
        near = nearest_file(file)
        raise InputError(
            f"no file {quote(place)}",
            code="file-not-found",
            hint=f"did you mean {near}?" if near else None,
        )
    if not colon:
        known = ", ".join(_top_level(file)) or "none"
        raise UsageError(
            f"{quote(text)} does not say which {what}",
            code="bad-reference",
            hint=f"write {text}:NAME; in the file: {known}",
        )
    return Reference(text, name, file=file)


def find_object(reference: Reference, what: str) -> Any:
    """Import what a reference names. Runs the user's code at import.

    Raises InputError ``import-failed`` with the user's frames, ``module-not-found`` or UsageError
    ``unknown-<what>`` with the nearest name.
    """
    place = reference.file or reference.module
    with user_errors(f"importing {str(place)!r}", code="import-failed"):
        module = _import_file(reference.file) if reference.file else _import_module(reference)
    found: Any = module
    for part in reference.name.split("."):
        if not hasattr(found, part):
            own = getattr(module, "__name__", None)
            known = [
                name
                for name, value in vars(found).items()
                if not name.startswith("_") and getattr(value, "__module__", None) == own
            ]
            raise unknown_name(what, reference.name, known, f"see {place}")
        found = getattr(found, part)
    return found


def _import_module(reference: Reference) -> ModuleType:
    # What `python -m` does: the installed `mopt` script leaves the current folder out.
    _search_first(Path.cwd())
    try:
        return import_module(reference.module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if reference.module != missing and not reference.module.startswith(f"{missing}."):
            raise  # the module is there and lacks something it imports itself
        file = Path(*reference.module.split(".")).with_suffix(".py")
        near = file if file.is_file() else nearest_file(file)
        raise InputError(
            f"no module {quote(reference.module)}",
            code="module-not-found",
            hint=f"did you mean {near}:{reference.name}?" if near
            else "looked in the current folder and in the installed packages",
        ) from error  # fmt: skip


def _import_file(file: Path) -> ModuleType:
    path = file.resolve()
    for known in list(sys.modules.values()):
        if getattr(known, "__file__", None) == str(path):
            return known
    # As `python file.py` does, so that the file finds what lies beside it.
    _search_first(path.parent)
    name, number = path.stem, 1
    while name in sys.modules:
        name, number = f"{path.stem}_{number}", number + 1
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and torch look the module up by its name while it runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _top_level(file: Path) -> list[str]:
    """The public functions of a file, without running it."""
    with suppress(SyntaxError, ValueError):
        tree = ast.parse(file.read_bytes())
        return [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        ]
    return []


def nearest_file(path: Path) -> Path | None:
    """What lies beside ``path`` with a name most like it, for messages about missing files."""
    if not path.parent.is_dir():
        return None
    names = [entry.name for entry in path.parent.iterdir()]
    near = get_close_matches(path.name, names, n=1, cutoff=0.6)
    return path.with_name(near[0]) if near else None


@contextmanager
def user_errors(doing: str, *, code: str, hint: str | None = None) -> Iterator[None]:
    """Turn whatever the user's code raises into an InputError that shows his own frames."""
    try:
        yield
    except (MoptError, KeyboardInterrupt, MemoryError, GeneratorExit):
        raise
    except BaseException as error:  # his code may raise anything, and may call sys.exit
        shown, hidden = _frames(error)
        said = "".join(traceback.format_exception_only(error)).rstrip()
        lines = [f"{doing} failed", *shown, *(f"  {line}" for line in said.splitlines())]
        if hidden:
            lines.append(f"  (frames of mopt and torch are hidden: {hidden}; -v shows them)")
        raise InputError("\n".join(lines), code=code, hint=hint or _advice(error)) from error


def _frames(error: BaseException) -> tuple[list[str], int]:
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if _is_users(frame.filename)]
    lines = []
    for frame in own[-_SHOWN_FRAMES:]:
        lines.append(f"  {frame.filename}:{frame.lineno} in {frame.name}")
        if frame.line:
            lines.append(f"      {frame.line}")
    # Frames above the user's first one only tell how mopt got there.
    first = next((i for i, frame in enumerate(frames) if _is_users(frame.filename)), len(frames))
    return lines, len(frames) - first - len(own)


def _is_users(filename: str) -> bool:
    torch = sys.modules.get("torch")
    roots = [_MOPT_ROOT]
    if torch is not None and torch.__file__:
        roots.append(str(Path(torch.__file__).parent))
    return not filename.startswith((*roots, "<frozen", "<string>"))


def _advice(error: BaseException) -> str | None:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"install {error.name.partition('.')[0]!r} in the environment that mopt runs in"
    return None


def guarded_function(function: Callable[..., Any], doing: str, code: str) -> Callable[..., Any]:
    """A function of the user whose errors are shown as his: name and attributes stay."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with user_errors(doing, code=code):
            return function(*args, **kwargs)

    return call


class GuardedBatches:
    """An iterable of the user, or a function that returns one, whose errors are shown as his.

    Every loop asks for a new iterator, so a function or a collection can be read many times.
    """

    def __init__(self, batches: Iterable[Any] | Callable[[], Iterable[Any]]) -> None:
        self._batches = batches

    def __length_hint__(self) -> int:
        return length_hint(self._batches, 0)

    def __iter__(self) -> Iterator[Any]:
        doing, code = "reading the calibration data", "calibration-failed"
        with user_errors(doing, code=code):
            batches = self._batches() if callable(self._batches) else self._batches
            iterator = iter(batches)
        done = object()
        while True:
            with user_errors(doing, code=code):
                batch = next(iterator, done)
            if batch is done:
                return
            yield batch
