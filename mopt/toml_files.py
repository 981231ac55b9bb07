"""TOML that a stranger may have written (recipes, devices), read within limits, with lines.

``tomllib`` dies of RecursionError on deep brackets or long dotted keys and takes seconds on
ever-deeper table headers, so a linear scan bounds both first.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from dataclasses import dataclass, field
from typing import Any

from mopt.errors import InputError, LimitError, MoptError, quote
from mopt.limits import DEFAULT_LIMITS, Limits
from mopt.safe_read import OpenFile, open_file

_LARGEST_INT = 2**53
_TOKEN = re.compile(
    r'"""(?:[^"\\]++|\\.|"(?!""))*+(?:"{3,5}|\\?\Z)'
    r"|'''(?:[^']++|'(?!''))*+(?:'{3,5}|\Z)"
    r'|"(?:[^"\\\n]++|\\.)*+(?:"|\n|\\?\Z)'
    r"|'[^'\n]*+(?:'|\n|\Z)"
    r"|\#[^\n]*+"
    r"|[\[\]{},.=\n]",
    re.DOTALL,
)


@dataclass(frozen=True)
class TomlFile:
    """``data`` as ``tomllib`` gives it, and the line each key stands on."""

    name: str
    data: dict[str, Any]
    lines: dict[tuple[str | int, ...], int] = field(default_factory=dict)

    def site(self, *path: str | int) -> str:
        """``"recipe.toml:12"`` for a key path (list items by index), or of its nearest parent."""
        for length in range(len(path), 0, -1):
            if line := self.lines.get(path[:length]):
                return f"{self.name}:{line}"
        return self.name


def parse_toml(
    data: bytes | str,
    *,
    name: str,
    limits: Limits = DEFAULT_LIMITS,
    error: type[MoptError] = InputError,
) -> TomlFile:
    """The document in ``data``; ``name`` is shown in messages.

    Raises ``error`` (``toml-syntax``, ``toml-number``, ``toml-encoding``; with file and line) or
    LimitError (``toml-too-large``, ``toml-too-deep``).
    """
    if len(data) > limits.toml_bytes:
        raise LimitError(
            f"{name} has more than {limits.toml_bytes} bytes of TOML", code="toml-too-large"
        )
    if isinstance(data, bytes):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as e:
            line = data.count(b"\n", 0, e.start) + 1
            raise error(
                f"{name} is not UTF-8: byte {e.start}",
                code="toml-encoding",
                site=f"{name}:{line}",
            ) from e
    else:
        text = data
    text = text.replace("\r\n", "\n")
    key_starts = _scan(text, name, limits)
    try:
        parsed = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError) as e:
        raise _syntax_error(e, text, name, error) from e
    except RecursionError as e:
        raise LimitError(f"{name} is nested too deeply", code="toml-too-deep") from e
    document = TomlFile(name, parsed, _lines_of_keys(text, key_starts))
    _check_values(document, limits, error)
    return document


def _scan(text: str, name: str, limits: Limits) -> list[tuple[int, int, int]]:
    """Bound depth, dotted parts and keys; gives (line, start, end) of each line-level key."""
    depth = dots = keys = 0
    line, line_start = 1, 0
    found: list[tuple[int, int, int]] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token == ".":
            dots += 1
            if dots >= limits.toml_depth:
                raise _too_deep(f"a key of more than {limits.toml_depth} parts", name, line)
            continue
        if token[0] in "\"'#":
            line += token.count("\n")
            if token.endswith("\n"):
                line_start, dots = match.end(), 0
            continue
        dots = 0
        if token == "\n":
            line, line_start = line + 1, match.end()
        elif token in "[{":
            if depth == 0 and not text[line_start : match.start()].strip():
                found.append((line, line_start, -1))
                keys += 1
            depth += 1
            if depth > limits.toml_depth:
                raise _too_deep(f"brackets deeper than {limits.toml_depth}", name, line)
        elif token in "]}":
            depth = max(depth - 1, 0)
        elif token == "=":
            keys += 1
            if depth == 0:
                found.append((line, line_start, match.start()))
        if keys > limits.toml_keys:
            raise LimitError(
                f"{name} has more than {limits.toml_keys} keys",
                code="toml-too-large",
                site=f"{name}:{line}",
            )
    return found


def _too_deep(what: str, name: str, line: int) -> LimitError:
    return LimitError(f"{name} has {what}", code="toml-too-deep", site=f"{name}:{line}")


def _syntax_error(e: ValueError, text: str, name: str, error: type[MoptError]) -> MoptError:
    message, place = str(e), re.search(r"\(at line (\d+), column (\d+)\)", str(e))
    if place:
        site = f"{name}:{place[1]}:{place[2]}"
        message = message[: place.start()].strip()
    elif "end of document" in message:
        site = f"{name}:{text.count(chr(10)) + 1}"
    else:
        site = name
    return error(f"{name} is not TOML: {message}", code="toml-syntax", site=site)


def _lines_of_keys(
    text: str, starts: list[tuple[int, int, int]]
) -> dict[tuple[str | int, ...], int]:
    """The line of each header and key, by full path; the text is known to be valid TOML."""
    lines: dict[tuple[str | int, ...], int] = {}
    counts: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    for line, start, end in starts:
        if end >= 0:
            path = table + _key_parts(text[start:end])
        else:
            stop = text.find("\n", start)
            header = text[start : stop if stop >= 0 else None]
            is_list = header.lstrip().startswith("[[")
            parts = _header_parts(header, is_list)
            path = ()
            for index, part in enumerate(parts):
                path = (*path, part)
                if is_list and index == len(parts) - 1:
                    counts[path] = counts.get(path, -1) + 1
                if path in counts:
                    path = (*path, counts[path])
            table = path
        for length in range(1, len(path) + 1):
            lines.setdefault(path[:length], line)
        lines[path] = line
    return lines


def _key_parts(key: str) -> tuple[str, ...]:
    parts: list[str] = []
    value: Any = tomllib.loads(f"{key.strip()} = 0")
    while isinstance(value, dict):
        (part, value), *_ = value.items()
        parts.append(part)
    return tuple(parts)


def _header_parts(header: str, is_list: bool) -> tuple[str, ...]:
    value: Any = tomllib.loads(header)
    parts: list[str] = []
    while isinstance(value, dict) and value:
        (part, value), *_ = value.items()
        parts.append(part)
        if is_list and isinstance(value, list):
            break
    return tuple(parts)


def _check_values(document: TomlFile, limits: Limits, error: type[MoptError]) -> None:
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), document.data)]
    while stack:
        path, value = stack.pop()
        shown = quote(".".join(map(str, path)))
        if isinstance(value, dict | list):
            if len(path) > limits.toml_depth:
                raise LimitError(
                    f"{document.name}: {shown} is nested deeper than {limits.toml_depth}",
                    code="toml-too-deep",
                    site=document.site(*path),
                )
            items = value.items() if isinstance(value, dict) else enumerate(value)
            stack.extend(((*path, key), item) for key, item in items)
        elif isinstance(value, str) and len(value) > limits.toml_string:
            raise LimitError(
                f"{document.name}: {shown} is a string of {len(value)} characters",
                code="toml-too-large",
                site=document.site(*path),
            )
        elif (isinstance(value, float) and not math.isfinite(value)) or (
            isinstance(value, int) and abs(value) > _LARGEST_INT
        ):
            raise error(
                f"{document.name}: {shown} is not a finite number within 2**53",
                code="toml-number",
                site=document.site(*path),
            )


def read_toml(
    source: OpenFile | str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS
) -> TomlFile:
    """``parse_toml`` of an open file, or of a path the user named."""
    if not isinstance(source, OpenFile):
        with open_file(source) as file:
            return read_toml(file, limits=limits)
    if source.size > limits.toml_bytes:
        raise LimitError(
            f"{source.name} has {source.size} bytes, at most {limits.toml_bytes} are read",
            code="toml-too-large",
        )
    return parse_toml(source.read(), name=source.name, limits=limits, error=source.error)
