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
from collections.abc import Mapping
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
from mopt.device_calibration import read_calibration
from mopt.device_fields import FieldReader
from mopt.errors import quote
from mopt.toml_files import parse_toml, read_toml

SCHEMA = 1
_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_DATE = re.compile(r"\d{4}(-\d{2}(-\d{2})?)?")
_FORMATS = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "int16", "int8", "int6", "int4", "int3",
            "int2", "fp4")  # fmt: skip
_ARITHMETIC = ("half", "weight-only", "dynamic")
_POWER = ("idle", "limit")


def read_device(path: str | os.PathLike[str]) -> DeviceProfile:
    """The profile in a file. Raises InputError (``device-profile``) or what reading TOML raises."""
    return _ProfileReader(read_toml(os.fspath(path))).profile()


def parse_device(text: bytes | str, *, name: str = "profile") -> DeviceProfile:
    """The profile in a text; ``name`` is what messages call it."""
    return _ProfileReader(parse_toml(text, name=name)).profile()


class _ProfileReader(FieldReader):
    """One document on its way to a profile."""

    def profile(self) -> DeviceProfile:
        """The profile that the document describes."""
        data = self.document.data
        self.only(
            (), data,
            required=("schema", "id", "name", "kind", "summary", "sources", "processor", "memory"),
            optional=("class", "aliases", "backends", "link", "efficiency", "power", "sustained",
                      "calibration"),
        )  # fmt: skip
        if data["schema"] != SCHEMA:
            raise self.error(("schema",), f"is {quote(data['schema'])}, this mopt reads {SCHEMA}")
        self.sources = self._read_sources(data["sources"])
        memory = tuple(self._tier(i, entry) for i, entry in self.entries("memory"))
        processors = tuple(
            self._processor(i, entry, {tier.name for tier in memory})
            for i, entry in self.entries("processor")
        )
        return DeviceProfile(
            id=self.match(("id",), data["id"], _ID, "a short name such as 'a100'"),
            name=self.text(("name",), data["name"]),
            kind=self.choice(("kind",), data["kind"], DEVICE_KINDS),
            summary=self.text(("summary",), data["summary"]),
            processors=processors,
            memory=memory,
            efficiency=self._efficiencies(data),
            sources=self.sources,
            links=tuple(
                self._link(i, entry, {tier.name for tier in memory})
                for i, entry in (self.entries("link") if "link" in data else ())
            ),
            aliases=self.texts(("aliases",), data.get("aliases", [])),
            backends=self.texts(("backends",), data.get("backends", [])),
            efficiency_class=str(data.get("class", "")),
            power={
                key: self.quantity(("power", key), value, "power")
                for key, value in self.table(("power",), data.get("power", {}), _POWER).items()
            },
            sustained=(
                self.quantity(("sustained",), data["sustained"], "ratio")
                if "sustained" in data else None
            ),
            calibration=(
                read_calibration(self, data["calibration"]) if "calibration" in data else None
            ),
            origin=self.document.name,
        )  # fmt: skip

    # ---- parts

    def _read_sources(self, given: Any) -> dict[str, Source]:
        found = {}
        for name, entry in self.table(("sources",), given).items():
            at = ("sources", name)
            self.only(at, entry, required=("kind", "title", "date"))
            kind = self.choice((*at, "kind"), entry["kind"], SOURCE_KINDS)
            date = self.match((*at, "date"), entry["date"], _DATE, "a date such as '2024-05'")
            title = self.text((*at, "title"), entry["title"])
            found[name] = Source(name, kind, title, date)  # type: ignore[arg-type]
        return found

    def _tier(self, index: int, entry: Any) -> MemoryTier:
        at = ("memory", index)
        self.only(
            at, entry, required=("name", "managed", "capacity", "bandwidth", "latency"),
            optional=("energy", "read-only"),
        )  # fmt: skip
        managed = self.choice((*at, "managed"), entry["managed"], ("hardware", "software"))
        return MemoryTier(
            name=self.text((*at, "name"), entry["name"]),
            capacity=self.quantity((*at, "capacity"), entry["capacity"], "bytes"),
            bandwidth=self.quantity((*at, "bandwidth"), entry["bandwidth"], "bandwidth"),
            latency=self.quantity((*at, "latency"), entry["latency"], "time"),
            energy=self.optional(at, entry, "energy", "energy per byte"),
            managed=managed,  # type: ignore[arg-type]
            read_only=bool(entry.get("read-only", False)),
        )

    def _processor(self, index: int, entry: Any, tiers: set[str]) -> Processor:
        at = ("processor", index)
        self.only(
            at, entry, required=("name", "memory", "launch", "peak"),
            optional=("energy", "arithmetic", "runs", "most-rows", "units"),
        )  # fmt: skip
        peaks = self.table((*at, "peak"), entry["peak"], _FORMATS)
        if not peaks:
            raise self.error((*at, "peak"), "has no rate")
        arithmetic = self.table((*at, "arithmetic"), entry.get("arithmetic", {}), _ARITHMETIC)
        for key, value in arithmetic.items():
            self.choice((*at, "arithmetic", key), value, ("own", *peaks))
        energies = self.table((*at, "energy"), entry.get("energy", {}), _FORMATS)
        runs = self.texts((*at, "runs"), entry.get("runs", []))
        for kind in runs:
            self.choice((*at, "runs"), kind, WORK_KINDS)
        return Processor(
            name=self.text((*at, "name"), entry["name"]),
            memory=self.choice((*at, "memory"), entry["memory"], sorted(tiers)),
            peak={
                key: self.quantity((*at, "peak", key), value, "rate")
                for key, value in peaks.items()
            },
            launch=self.quantity((*at, "launch"), entry["launch"], "time"),
            energy={
                key: self.quantity((*at, "energy", key), value, "energy per operation")
                for key, value in energies.items()
            },
            arithmetic=arithmetic,
            runs=frozenset(runs),
            most_rows=self.optional(at, entry, "most-rows", "count"),
            units=self.optional(at, entry, "units", "count"),
        )

    def _link(self, index: int, entry: Any, tiers: set[str]) -> Link:
        at = ("link", index)
        self.only(
            at, entry, required=("start", "end", "bandwidth", "latency"), optional=("energy",)
        )
        ends = sorted(tiers | {"host"})
        return Link(
            start=self.choice((*at, "start"), entry["start"], ends),
            end=self.choice((*at, "end"), entry["end"], ends),
            bandwidth=self.quantity((*at, "bandwidth"), entry["bandwidth"], "bandwidth"),
            latency=self.quantity((*at, "latency"), entry["latency"], "time"),
            energy=self.optional(at, entry, "energy", "energy per byte"),
        )

    def _efficiencies(self, data: Mapping[str, Any]) -> dict[str, Efficiency]:
        found: dict[str, Efficiency] = {}
        if "class" in data:
            found.update(self._class_efficiencies(data["class"]))
        own = self.table(("efficiency",), data.get("efficiency", {}), WORK_KINDS)
        for kind, entry in own.items():
            at = ("efficiency", kind)
            self.only(at, entry, required=("compute", "memory", "overlap"))
            found[kind] = Efficiency(
                *(
                    self.quantity((*at, key), entry[key], "ratio")
                    for key in ("compute", "memory", "overlap")
                )
            )
            for key, value in (("compute", found[kind].compute), ("memory", found[kind].memory)):
                if value.basic > 1:
                    raise self.error((*at, key), f"is {value}, more than the peak itself")
        missing = [kind for kind in WORK_KINDS if kind not in found]
        if missing:
            raise self.error(
                ("efficiency",), f"lacks {', '.join(missing)}",
                hint="give them, or a class that has them: class = \"cpu\"",
            )  # fmt: skip
        return found

    def _class_efficiencies(self, name: Any) -> Mapping[str, Efficiency]:
        from mopt.registry import package_folder

        folder = package_folder("mopt.cost_models.devices")
        classes = {path.stem[1:]: path for path in sorted(folder.glob("_[!_]*.toml"))}
        self.choice(("class",), name, sorted(classes))
        reader = _ProfileReader(read_toml(classes[name]))
        data = reader.document.data
        reader.only((), data, required=("schema", "sources", "efficiency"))
        reader.sources = reader._read_sources(data["sources"])
        found = reader._efficiencies(data)
        for key, source in reader.sources.items():
            self.sources.setdefault(key, source)
        return found
