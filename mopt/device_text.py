"""A device profile as TOML text that ``mopt.device_file`` reads back as the same profile."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mopt.device import DeviceProfile, Efficiency, MemoryTier, Processor
from mopt.device_file import SCHEMA
from mopt.quantity import Quantity


def device_toml(profile: DeviceProfile) -> str:
    """The whole profile; efficiencies that came from a class are written out."""
    lines = [
        f"schema = {SCHEMA}",
        f"id = {_text(profile.id)}",
        f"name = {_text(profile.name)}",
        f"kind = {_text(profile.kind)}",
        f"summary = {_text(profile.summary)}",
    ]
    if profile.aliases:
        lines.append(f"aliases = {_value(list(profile.aliases))}")
    if profile.backends:
        lines.append(f"backends = {_value(list(profile.backends))}")
    if profile.sustained is not None:
        lines.append(f"sustained = {_quantity(profile.sustained)}")
    for source in profile.sources.values():
        lines += ["", f"[sources.{_key(source.name)}]", f"kind = {_text(source.kind)}",
                  f"title = {_text(source.title)}", f"date = {_text(source.date)}"]  # fmt: skip
    for processor in profile.processors:
        lines += ["", "[[processor]]", *_processor(processor)]
    for tier in profile.memory:
        lines += ["", "[[memory]]", *_tier(tier)]
    for link in profile.links:
        lines += ["", "[[link]]", f"start = {_text(link.start)}", f"end = {_text(link.end)}"]
        lines += _quantities(link, ("bandwidth", "latency", "energy"))
    if profile.power:
        lines += ["", "[power]", *_table(profile.power)]
    for kind, efficiency in profile.efficiency.items():
        lines += ["", f"[efficiency.{kind}]", *_efficiency(efficiency)]
    if profile.calibration is not None:
        lines += ["", *_tables("calibration", profile.calibration.as_table())]
    return "\n".join(lines) + "\n"


def _processor(processor: Processor) -> Iterable[str]:
    yield f"name = {_text(processor.name)}"
    yield f"memory = {_text(processor.memory)}"
    if processor.units is not None:
        yield f"units = {_quantity(processor.units)}"
    if processor.runs:
        yield f"runs = {_value(sorted(processor.runs))}"
    if processor.most_rows is not None:
        yield f"most-rows = {_quantity(processor.most_rows)}"
    yield f"launch = {_quantity(processor.launch)}"
    for key, name in processor.arithmetic.items():
        yield f"arithmetic.{_key(key)} = {_text(name)}"
    for part in ("peak", "energy"):
        for key, quantity in getattr(processor, part).items():
            yield f"{part}.{_key(key)} = {_quantity(quantity)}"


def _tier(tier: MemoryTier) -> Iterable[str]:
    yield f"name = {_text(tier.name)}"
    yield f"managed = {_text(tier.managed)}"
    if tier.read_only:
        yield "read-only = true"
    yield from _quantities(tier, ("capacity", "bandwidth", "latency", "energy"))


def _efficiency(efficiency: Efficiency) -> Iterable[str]:
    return _quantities(efficiency, ("compute", "memory", "overlap"))


def _quantities(owner: Any, names: Iterable[str]) -> list[str]:
    return _table({n: q for n in names if (q := getattr(owner, n)) is not None})


def _table(quantities: Mapping[str, Quantity]) -> list[str]:
    return [f"{_key(name)} = {_quantity(quantity)}" for name, quantity in quantities.items()]


def _tables(name: str, table: Mapping[str, Any]) -> Iterable[str]:
    """A table of plain values, the tables inside it after its own keys."""
    yield f"[{name}]"
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield f"{_key(key)} = {_value(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield ""
            yield from _tables(f"{name}.{_key(key)}", value)


def _quantity(quantity: Quantity) -> str:
    return (
        f"{{ value = {_value(quantity.value)}, unit = {_text(quantity.unit)}, "
        f"source = {_text(quantity.source)} }}"
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, str):
        return _text(value)
    return repr(value)


def _text(value: str) -> str:
    # JSON's escapes are TOML's, but for one character that TOML does not allow bare.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    is_bare = name.replace("-", "").replace("_", "").isalnum() and name.isascii()
    return name if is_bare else _text(name)
