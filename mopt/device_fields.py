"""Fields of a device profile, each looked up with an error that names it, the file and the line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from mopt.device import Source
from mopt.errors import InputError, quote
from mopt.quantity import PLAUSIBLE, UNITS, Quantity
from mopt.toml_files import TomlFile

Place = tuple[str | int, ...]


class FieldReader:
    """One document on its way to a profile; every look-up knows where it stands."""

    def __init__(self, document: TomlFile) -> None:
        self.document = document
        self.sources: dict[str, Source] = {}

    def quantity(self, at: Place, entry: Any, dimension: str) -> Quantity:
        """A number with its unit and source: positive, and not beyond what any device has."""
        if not isinstance(entry, dict):
            raise self.error(
                at, f"is {quote(entry)}, expected a table",
                hint='{ value = 312, unit = "Top/s", source = "sheet" }',
            )  # fmt: skip
        self.only(at, entry, required=("value", "unit", "source"))
        value, unit = entry["value"], entry["unit"]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error((*at, "value"), f"is {quote(value)}, expected a number")
        if value <= 0:
            raise self.error(
                (*at, "value"), f"is {value}, expected a positive number",
                hint="leave out what is not known",
            )  # fmt: skip
        self.choice((*at, "unit"), unit, UNITS[dimension])
        self.choice((*at, "source"), entry["source"], self.sources)
        quantity = Quantity(value, unit, dimension, entry["source"])
        low, high = PLAUSIBLE[dimension]
        if not low <= quantity.basic <= high:
            raise self.error((*at, "value"), f"is {quantity}, which no device has")
        return quantity

    def optional(
        self, at: Place, entry: Mapping[str, Any], key: str, dimension: str
    ) -> Quantity | None:
        """The same for a field that may be missing."""
        return self.quantity((*at, key), entry[key], dimension) if key in entry else None

    def entries(self, key: str) -> Iterable[tuple[int, Any]]:
        """The tables of a list such as ``[[memory]]``, with their positions."""
        given = self.document.data[key]
        if not isinstance(given, list) or not given:
            raise self.error((key,), f"must be a list of tables: [[{key}]]")
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in given]
        for index, name in enumerate(names):
            if name is not None and name in names[:index]:
                raise self.error((key, index, "name"), f"{quote(name)} is there twice")
        return enumerate(given)

    def table(self, at: Place, given: Any, known: Iterable[str] | None = None) -> dict[str, Any]:
        """A table, with keys among ``known`` where that is given."""
        if not isinstance(given, dict):
            raise self.error(at, f"is {quote(given)}, expected a table")
        if known is not None:
            self.only(at, given, required=(), optional=tuple(known))
        return given

    def only(
        self,
        at: Place,
        entry: Any,
        *,
        required: tuple[str, ...],
        optional: tuple[str, ...] = (),
    ) -> None:
        """Refuse a table that lacks a required key or has one that is neither."""
        if not isinstance(entry, dict):
            raise self.error(at, f"is {quote(entry)}, expected a table")
        known = (*required, *optional)
        for key in entry:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise self.error((*at, key), "is not a field of a device profile", hint=hint)
        for key in required:
            if key not in entry:
                raise self.error((*at, key), "is missing")

    def text(self, at: Place, value: Any) -> str:
        """A text that is not empty."""
        if not isinstance(value, str) or not value.strip():
            raise self.error(at, f"is {quote(value)}, expected a text")
        return value

    def texts(self, at: Place, value: Any) -> tuple[str, ...]:
        """A list of texts."""
        if not isinstance(value, list):
            raise self.error(at, f"is {quote(value)}, expected a list of texts")
        return tuple(self.text(at, item) for item in value)

    def choice(self, at: Place, value: Any, known: Iterable[str]) -> str:
        """One of the known texts."""
        names = list(known)
        if not isinstance(value, str) or value not in names:
            raise self.error(at, f"is {quote(value)}, expected one of {', '.join(names)}")
        return value

    def match(self, at: Place, value: Any, pattern: re.Pattern[str], wanted: str) -> str:
        """A text of a certain form, which ``wanted`` describes."""
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self.error(at, f"is {quote(value)}, expected {wanted}")
        return value

    def number(self, at: Place, value: Any, low: float, high: float) -> float:
        """A plain number from ``low`` to ``high``."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(at, f"is {quote(value)}, expected a number")
        if not low <= value <= high:
            raise self.error(at, f"is {value}, expected {low:g} to {high:g}")
        return float(value)

    def numbers(self, at: Place, value: Any, low: float, high: float) -> tuple[float, ...]:
        """A list of plain numbers."""
        if not isinstance(value, list):
            raise self.error(at, f"is {quote(value)}, expected a list of numbers")
        return tuple(self.number(at, item, low, high) for item in value)

    def error(self, at: Place, what: str, hint: str | None = None) -> InputError:
        """What to raise about a field: names it, the file and the line."""
        shown = ".".join(map(str, at))
        return InputError(
            f"device profile {quote(self.document.name)}: {shown} {what}",
            code="device-profile",
            site=self.document.site(*at),
            hint=hint,
        )
