"""Damaged files made from sound ones: by their structure where it is JSON, else by their bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

_NUMBERS = ("-1", "0", "1", "1e999", "NaN", "null", "[]", "{}", '""', "4294967296", "0.5", "true",
            "9223372036854775807", "18446744073709551616", "-9007199254740993")  # fmt: skip
_WORDS = ("../../x", "/etc/passwd", "a/../../b", "\\u0000", "<script>", "::add-mask::x", "\x1b[2J",
          "\u202e", "__class__", "con", "é" * 50, "a" * 5000, "[" * 200, "{\"a\":" * 200,
          "%s%n", "${HOME}", "\ud83d\ude00", "=cmd()", "..", ".", "")  # fmt: skip


def mutate(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """A seed with one to four changes: of its structure where it is JSON, else of its bytes."""
    data = chance.choice(seeds)
    for _ in range(chance.choice((1, 1, 2, 4))):
        try:
            document = json.loads(data) if chance.random() < 0.6 else None
        except (ValueError, RecursionError):
            document = None
        if isinstance(document, dict | list) and document:
            data = _dump(_changed(document, chance))
        else:
            data = _damaged(data, seeds, chance)
    return data


def _dump(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")


def _odd(chance: random.Random) -> Any:
    kind = chance.randrange(4)
    if kind == 0:
        return chance.choice((-1, 0, 1, 2**31, 2**53, 2**64, 1e308, 0.5, float("nan"), True, None))
    if kind == 1:
        return chance.choice(_WORDS)
    if kind == 2:
        return [_odd(chance) for _ in range(chance.randrange(3))]
    return {chance.choice(_WORDS): _odd(chance) for _ in range(chance.randrange(3))}


def _changed(document: Any, chance: random.Random) -> Any:
    """The document with one value, key or item replaced, removed, repeated or moved."""
    places = list(_places(document))
    holder, key = chance.choice(places)
    kind = chance.randrange(5)
    if kind <= 1:
        holder[key] = _odd(chance)
    elif kind == 2:
        del holder[key]
    elif kind == 3:
        other, where = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[where]))
    elif isinstance(holder, list):
        holder[key:key] = [holder[key]] * chance.choice((1, 3, 500))
    else:
        holder[chance.choice(_WORDS)] = holder[key]
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _damaged(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    raw = bytearray(data or b"x")
    at = chance.randrange(len(raw))
    end = min(len(raw), at + chance.choice((1, 2, 4, 8, 64)))
    kind = chance.randrange(9)
    if kind == 0:
        raw[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        raw[at:end] = chance.randbytes(end - at)
    elif kind == 2:
        del raw[at:end]
    elif kind == 3:
        raw[at:at] = raw[at:end] * chance.choice((1, 2, 300))
    elif kind == 4:
        del raw[at:]
    elif kind == 5:
        raw[at:end] = chance.choice(_NUMBERS).encode()
    elif kind == 6:
        raw[at:end] = chance.choice(_WORDS).encode("utf-8", "replace")
    elif kind == 7:
        width = chance.choice((1, 2, 4, 8))
        number = chance.choice((0, 1, 2**7, 2**15, 2**31, 2**63, 2**64 - 1)) % 2 ** (8 * width)
        raw[at : at + width] = number.to_bytes(width, chance.choice(("little", "big")))
    else:
        other = chance.choice(seeds)
        cut = chance.randrange(len(other) + 1)
        raw[at:] = other[cut:]
    return bytes(raw)
