"""Device profiles in TOML, read with an error for every field that is missing, wrong or unknown.

    schema = 1
    id = "a100"
    name = "NVIDIA A100 80 GB SXM"
    kind = "gpu"
    class = "gpu"                       # efficiencies that are not given come from _gpu.toml
    summary = "..."

    [sources.sheet]
    kind = "data-sheet"                 # data-sheet, paper, measurement, derived or estimate
    title = "NVIDIA A100 data sheet"
    date = "2021-06"

    [[processor]]
    name = "sm"
    memory = "hbm"
    launch = { value = 4, unit = "us", source = "guess" }
    peak.fp16 = { value = 312, unit = "Top/s", source = "sheet" }
    energy.fp16 = { value = 0.8, unit = "pJ/op", source = "guess" }

    [[memory]]
    name = "hbm"
    managed = "software"
    capacity = { value = 80, unit = "GB", source = "sheet" }
    ...

Every number is such a table: value, unit, and the name of a source that stands in the same file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mopt.device import (
    DEVICE_KINDS,
    SOURCE_KINDS,
    WORK_KINDS,
    DeviceProfile,
    Efficiency,
    Link,
    MemoryTier,
    Processor,
    Source,
)
from mopt.errors import InputError, quote
from mopt.quantity import PLAUSIBLE, UNITS, Quantity
from mopt.toml_files import TomlFile, parse_toml, read_toml

SCHEMA = 1
_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_DATE = re.compile(r"\d{4}(-\d{2}(-\d{2})?)?")
_FORMATS = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "int16", "int8", "int6", "int4", "int3",
            "int2", "fp4")  # fmt: skip
_ARITHMETIC = ("half", "weight-only", "dynamic")
_POWER = ("idle", "limit")


def read_device(path: str | os.PathLike[str]) -> DeviceProfile:
    """The profile in a file. Raises InputError (``device-profile``) or what reading TOML raises."""
    return _Reader(read_toml(os.fspath(path)), Path(path).parent).profile()


def parse_device(text: bytes | str, *, name: str = "profile") -> DeviceProfile:
    """The profile in a text; ``name`` is what messages call it."""
    return _Reader(parse_toml(text, name=name), None).profile()


class _Reader:
    """One document on its way to a profile; every look-up knows where it stands."""

    def __init__(self, document: TomlFile, folder: Path | None) -> None:
        self._document = document
        self._folder = folder
        self._sources: dict[str, Source] = {}

    def profile(self) -> DeviceProfile:
        data = self._document.data
        self._only(
            (), data,
            required=("schema", "id", "name", "kind", "summary", "sources", "processor", "memory"),
            optional=("class", "aliases", "backends", "link", "efficiency", "power", "sustained",
                      "calibration"),
        )  # fmt: skip
        if data["schema"] != SCHEMA:
            raise self._error(("schema",), f"is {quote(data['schema'])}, this mopt reads {SCHEMA}")
        self._sources = self._read_sources(data["sources"])
        memory = tuple(self._tier(i, entry) for i, entry in self._entries("memory"))
        processors = tuple(
            self._processor(i, entry, {tier.name for tier in memory})
            for i, entry in self._entries("processor")
        )
        return DeviceProfile(
            id=self._match(("id",), data["id"], _ID, "a short name such as 'a100'"),
            name=self._text(("name",), data["name"]),
            kind=self._choice(("kind",), data["kind"], DEVICE_KINDS),
            summary=self._text(("summary",), data["summary"]),
            processors=processors,
            memory=memory,
            efficiency=self._efficiencies(data),
            sources=self._sources,
            links=tuple(
                self._link(i, entry, {tier.name for tier in memory})
                for i, entry in (self._entries("link") if "link" in data else ())
            ),
            aliases=self._texts(("aliases",), data.get("aliases", [])),
            backends=self._texts(("backends",), data.get("backends", [])),
            efficiency_class=str(data.get("class", "")),
            power={
                key: self._quantity(("power", key), value, "power")
                for key, value in self._table(("power",), data.get("power", {}), _POWER).items()
            },
            sustained=(
                self._quantity(("sustained",), data["sustained"], "ratio")
                if "sustained" in data else None
            ),
            calibration=(
                self._table(("calibration",), data["calibration"]) if "calibration" in data
                else None
            ),
            origin=self._document.name,
        )  # fmt: skip

    # ---- parts

    def _read_sources(self, given: Any) -> dict[str, Source]:
        found = {}
        for name, entry in self._table(("sources",), given).items():
            at = ("sources", name)
            self._only(at, entry, required=("kind", "title", "date"))
            kind = self._choice((*at, "kind"), entry["kind"], SOURCE_KINDS)
            date = self._match((*at, "date"), entry["date"], _DATE, "a date such as '2024-05'")
            title = self._text((*at, "title"), entry["title"])
            found[name] = Source(name, kind, title, date)  # type: ignore[arg-type]
        return found

    def _tier(self, index: int, entry: Any) -> MemoryTier:
        at = ("memory", index)
        self._only(
            at, entry, required=("name", "managed", "capacity", "bandwidth", "latency"),
            optional=("energy", "read-only"),
        )  # fmt: skip
        managed = self._choice((*at, "managed"), entry["managed"], ("hardware", "software"))
        return MemoryTier(
            name=self._text((*at, "name"), entry["name"]),
            capacity=self._quantity((*at, "capacity"), entry["capacity"], "bytes"),
            bandwidth=self._quantity((*at, "bandwidth"), entry["bandwidth"], "bandwidth"),
            latency=self._quantity((*at, "latency"), entry["latency"], "time"),
            energy=self._optional(at, entry, "energy", "energy per byte"),
            managed=managed,  # type: ignore[arg-type]
            read_only=bool(entry.get("read-only", False)),
        )

    def _processor(self, index: int, entry: Any, tiers: set[str]) -> Processor:
        at = ("processor", index)
        self._only(
            at, entry, required=("name", "memory", "launch", "peak"),
            optional=("energy", "arithmetic", "runs", "most-rows", "units"),
        )  # fmt: skip
        peaks = self._table((*at, "peak"), entry["peak"], _FORMATS)
        if not peaks:
            raise self._error((*at, "peak"), "has no rate")
        arithmetic = self._table((*at, "arithmetic"), entry.get("arithmetic", {}), _ARITHMETIC)
        for key, value in arithmetic.items():
            self._choice((*at, "arithmetic", key), value, ("own", *peaks))
        energies = self._table((*at, "energy"), entry.get("energy", {}), _FORMATS)
        runs = self._texts((*at, "runs"), entry.get("runs", []))
        for kind in runs:
            self._choice((*at, "runs"), kind, WORK_KINDS)
        return Processor(
            name=self._text((*at, "name"), entry["name"]),
            memory=self._choice((*at, "memory"), entry["memory"], sorted(tiers)),
            peak={
                key: self._quantity((*at, "peak", key), value, "rate")
                for key, value in peaks.items()
            },
            launch=self._quantity((*at, "launch"), entry["launch"], "time"),
            energy={
                key: self._quantity((*at, "energy", key), value, "energy per operation")
                for key, value in energies.items()
            },
            arithmetic=arithmetic,
            runs=frozenset(runs),
            most_rows=self._optional(at, entry, "most-rows", "count"),
            units=self._optional(at, entry, "units", "count"),
        )

    def _link(self, index: int, entry: Any, tiers: set[str]) -> Link:
        at = ("link", index)
        self._only(
            at, entry, required=("start", "end", "bandwidth", "latency"), optional=("energy",)
        )
        ends = sorted(tiers | {"host"})
        return Link(
            start=self._choice((*at, "start"), entry["start"], ends),
            end=self._choice((*at, "end"), entry["end"], ends),
            bandwidth=self._quantity((*at, "bandwidth"), entry["bandwidth"], "bandwidth"),
            latency=self._quantity((*at, "latency"), entry["latency"], "time"),
            energy=self._optional(at, entry, "energy", "energy per byte"),
        )

    def _efficiencies(self, data: Mapping[str, Any]) -> dict[str, Efficiency]:
        found: dict[str, Efficiency] = {}
        if "class" in data:
            found.update(self._class_efficiencies(data["class"]))
        own = self._table(("efficiency",), data.get("efficiency", {}), WORK_KINDS)
        for kind, entry in own.items():
            at = ("efficiency", kind)
            self._only(at, entry, required=("compute", "memory", "overlap"))
            found[kind] = Efficiency(
                *(
                    self._quantity((*at, key), entry[key], "ratio")
                    for key in ("compute", "memory", "overlap")
                )
            )
            for key, value in (("compute", found[kind].compute), ("memory", found[kind].memory)):
                if value.basic > 1:
                    raise self._error((*at, key), f"is {value}, more than the peak itself")
        missing = [kind for kind in WORK_KINDS if kind not in found]
        if missing:
            raise self._error(
                ("efficiency",), f"lacks {', '.join(missing)}",
                hint="give them, or a class that has them: class = \"cpu\"",
            )  # fmt: skip
        return found

    def _class_efficiencies(self, name: Any) -> Mapping[str, Efficiency]:
        from mopt.registry import package_folder

        folder = package_folder("mopt.cost_models.devices")
        classes = {path.stem[1:]: path for path in sorted(folder.glob("_[!_]*.toml"))}
        self._choice(("class",), name, sorted(classes))
        reader = _Reader(read_toml(classes[name]), None)
        data = reader._document.data
        reader._only((), data, required=("schema", "sources", "efficiency"))
        reader._sources = reader._read_sources(data["sources"])
        found = reader._efficiencies(data)
        for key, source in reader._sources.items():
            self._sources.setdefault(key, source)
        return found

    # ---- fields

    def _quantity(self, at: tuple[str | int, ...], entry: Any, dimension: str) -> Quantity:
        if not isinstance(entry, dict):
            raise self._error(
                at, f"is {quote(entry)}, expected a table",
                hint='{ value = 312, unit = "Top/s", source = "sheet" }',
            )  # fmt: skip
        self._only(at, entry, required=("value", "unit", "source"))
        value, unit = entry["value"], entry["unit"]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error((*at, "value"), f"is {quote(value)}, expected a number")
        if value <= 0:
            raise self._error(
                (*at, "value"), f"is {value}, expected a positive number",
                hint="leave out what is not known",
            )  # fmt: skip
        self._choice((*at, "unit"), unit, UNITS[dimension])
        self._choice((*at, "source"), entry["source"], self._sources)
        quantity = Quantity(value, unit, dimension, entry["source"])
        low, high = PLAUSIBLE[dimension]
        if not low <= quantity.basic <= high:
            raise self._error((*at, "value"), f"is {quantity}, which no device has")
        return quantity

    def _optional(
        self, at: tuple[str | int, ...], entry: Mapping[str, Any], key: str, dimension: str
    ) -> Quantity | None:
        return self._quantity((*at, key), entry[key], dimension) if key in entry else None

    def _entries(self, key: str) -> Iterable[tuple[int, Any]]:
        given = self._document.data[key]
        if not isinstance(given, list) or not given:
            raise self._error((key,), f"must be a list of tables: [[{key}]]")
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in given]
        for index, name in enumerate(names):
            if name is not None and name in names[:index]:
                raise self._error((key, index, "name"), f"{quote(name)} is there twice")
        return enumerate(given)

    def _table(
        self, at: tuple[str | int, ...], given: Any, known: Iterable[str] | None = None
    ) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise self._error(at, f"is {quote(given)}, expected a table")
        if known is not None:
            self._only(at, given, required=(), optional=tuple(known))
        return given

    def _only(
        self,
        at: tuple[str | int, ...],
        entry: Any,
        *,
        required: tuple[str, ...],
        optional: tuple[str, ...] = (),
    ) -> None:
        if not isinstance(entry, dict):
            raise self._error(at, f"is {quote(entry)}, expected a table")
        known = (*required, *optional)
        for key in entry:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise self._error((*at, key), "is not a field of a device profile", hint=hint)
        for key in required:
            if key not in entry:
                raise self._error((*at, key), "is missing")

    def _text(self, at: tuple[str | int, ...], value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self._error(at, f"is {quote(value)}, expected a text")
        return value

    def _texts(self, at: tuple[str | int, ...], value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise self._error(at, f"is {quote(value)}, expected a list of texts")
        return tuple(self._text(at, item) for item in value)

    def _choice(self, at: tuple[str | int, ...], value: Any, known: Iterable[str]) -> str:
        names = list(known)
        if not isinstance(value, str) or value not in names:
            raise self._error(at, f"is {quote(value)}, expected one of {', '.join(names)}")
        return value

    def _match(
        self, at: tuple[str | int, ...], value: Any, pattern: re.Pattern[str], wanted: str
    ) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self._error(at, f"is {quote(value)}, expected {wanted}")
        return value

    def _error(self, at: tuple[str | int, ...], what: str, hint: str | None = None) -> InputError:
        shown = ".".join(map(str, at))
        return InputError(
            f"device profile {quote(self._document.name)}: {shown} {what}",
            code="device-profile",
            site=self._document.site(*at),
            hint=hint,
        )
