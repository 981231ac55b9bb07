"""JSON that a stranger may have written, read within limits; and the one way mopt writes JSON.

``json`` alone accepts NaN and 1e999, keeps the last of two equal keys and dies of RecursionError
on deep nesting, so a linear scan bounds depth, strings and the number of values first.
"""

from __future__ import annotations

import json
import math
import os
import re
from itertools import pairwise
from typing import Any

from mopt.errors import InputError, LimitError, MoptError, quote
from mopt.limits import DEFAULT_LIMITS, Limits
from mopt.safe_read import OpenFile, open_file

# An unterminated string matches up to the end, so that no input makes the scan start over.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_LARGEST_INT = 2**53


class _Refused(ValueError):
    """Raised inside ``json`` hooks; becomes the error of the caller's class."""


def parse_json(
    data: bytes,
    *,
    name: str,
    limits: Limits = DEFAULT_LIMITS,
    max_bytes: int | None = None,
    max_values: int | None = None,
    error: type[MoptError] = InputError,
) -> Any:
    """The value in ``data``; ``name`` is shown in messages.

    Sizes default to those of a small document; ``max_bytes`` and ``max_values`` change them (for a
    plan: ``limits.json_plan_bytes`` and ``limits.json_plan_values``). Raises ``error``
    (``json-syntax``, ``json-duplicate-key``, ``json-number``, ``json-encoding``) or LimitError
    (``json-too-large``, ``json-too-deep``).
    """
    max_bytes = limits.json_bytes if max_bytes is None else max_bytes
    max_values = limits.json_values if max_values is None else max_values
    if len(data) > max_bytes:
        raise LimitError(
            f"{name} has {len(data)} bytes of JSON, at most {max_bytes} are read",
            code="json-too-large",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise error(f"{name} is not UTF-8: byte {e.start}", code="json-encoding") from e
    _scan(data, name, limits, max_values, error)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_constant,
        )
    except _Refused as e:
        code = "json-duplicate-key" if e.args[0].startswith("two keys") else "json-number"
        raise error(f"{name}: {e}", code=code) from e
    except json.JSONDecodeError as e:
        raise error(f"{name}: {e.msg}", code="json-syntax", site=f"{name}:{e.lineno}") from e
    except RecursionError as e:
        raise LimitError(f"{name} is nested too deeply", code="json-too-deep") from e


def _scan(data: bytes, name: str, limits: Limits, max_values: int, error: type[MoptError]) -> None:
    depth, values = 0, 1
    for match in _TOKEN.finditer(data):
        token = match[0]
        first = token[0]
        if first == 0x22:
            if len(token) > limits.json_string or b"\\u" in token:
                _check_string(token, name, limits, error)
        elif first == 0x2C:
            values += 1
        elif first in b"[{":
            depth += 1
            values += 1
            if depth > limits.json_depth:
                raise LimitError(
                    f"{name} is nested deeper than {limits.json_depth}", code="json-too-deep"
                )
        else:
            depth -= 1
        if values > max_values:
            raise LimitError(f"{name} holds more than {max_values} values", code="json-too-large")


def _check_string(token: bytes, name: str, limits: Limits, error: type[MoptError]) -> None:
    try:
        text = json.loads(token)
    except json.JSONDecodeError as e:
        raise error(f"{name}: bad string: {e.msg}", code="json-syntax") from e
    if len(text) > limits.json_string:
        raise LimitError(
            f"{name} holds a string of {len(text)} characters, at most {limits.json_string} are "
            f"read: {quote(text)}",
            code="json-too-large",
        )
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise error(f"{name} holds half a character: {quote(text)}", code="json-encoding") from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(one for one, other in pairwise(keys) if one == other)
        raise _Refused(f"two keys are called {quote(twice)}")
    return result


def _integer(text: str) -> int:
    # Length first: converting a million digits is quadratic.
    if len(text) > 17 or abs(int(text)) > _LARGEST_INT:
        raise _Refused(f"the integer {quote(text)} is beyond 2**53")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {quote(text)} is not finite")
    return value


def _constant(text: str) -> float:
    raise _Refused(f"{text} is not a number JSON knows")


def read_json(
    source: OpenFile | str | os.PathLike[str],
    *,
    limits: Limits = DEFAULT_LIMITS,
    max_bytes: int | None = None,
    max_values: int | None = None,
) -> Any:
    """``parse_json`` of an open file, or of a path the user named."""
    max_bytes = limits.json_bytes if max_bytes is None else max_bytes
    if not isinstance(source, OpenFile):
        with open_file(source, max_bytes=max_bytes) as file:
            return read_json(file, limits=limits, max_bytes=max_bytes, max_values=max_values)
    if source.size > max_bytes:
        raise LimitError(
            f"{source.name} has {source.size} bytes, at most {max_bytes} are read",
            code="json-too-large",
        )
    return parse_json(
        source.read(),
        name=source.name,
        limits=limits,
        max_bytes=max_bytes,
        max_values=max_values,
        error=source.error,
    )


def json_bytes(value: Any, *, indent: int | None = 2) -> bytes:
    """The bytes mopt writes for ``value``: sorted keys, finite numbers only, one final newline.

    The same value gives the same bytes. Raises ValueError on NaN and infinities: write ``None``.
    """
    text = json.dumps(value, sort_keys=True, indent=indent, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode()
