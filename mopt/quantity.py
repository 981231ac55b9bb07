"""Numbers with a unit and a source, as device profiles hold them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PREFIXES = {"f": 1e-15, "p": 1e-12, "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0,
             "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}  # fmt: skip


def _scaled(unit: str, prefixes: str, names: dict[str, float] | None = None) -> dict[str, float]:
    scaled = {f"{p}{unit}": _PREFIXES[p] for p in ["", *prefixes]}
    return scaled | (names or {})


# By dimension: the units that may be written, and what one of each is in the first, basic unit.
UNITS: dict[str, dict[str, float]] = {
    "rate": _scaled("op/s", "kMGTP"),
    "bytes": _scaled("B", "kMGT", {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}),
    "bandwidth": _scaled("B/s", "kMGT"),
    "time": _scaled("s", "mun"),
    "energy per byte": _scaled("J/B", "munpf"),
    "energy per operation": _scaled("J/op", "munpf"),
    "power": _scaled("W", "mk"),
    "frequency": _scaled("Hz", "kMG"),
    "count": {"1": 1.0},
    "ratio": {"1": 1.0, "%": 0.01},
}
BYTES = UNITS["bytes"] | {"KB": 1e3}  # KB is no SI unit, but many people write it


def read_bytes(text: str) -> int | None:
    """Bytes from ``65536``, ``64KiB`` or ``1.5 MB``, rounded down; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)", text.strip())
    if match is None or (match[2] or "B") not in BYTES:
        return None
    unit = int(BYTES[match[2] or "B"])
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


# What no device has: a value outside is a slip of the pen, such as GB/s for MB/s.
PLAUSIBLE: dict[str, tuple[float, float]] = {
    "rate": (1e5, 1e19),
    "bytes": (256, 1e16),
    "bandwidth": (1e6, 1e15),
    "time": (1e-10, 10),
    "energy per byte": (1e-15, 1e-6),
    "energy per operation": (1e-16, 1e-6),
    "power": (1e-4, 1e5),
    "frequency": (1e4, 1e11),
    "count": (1, 1e7),
    "ratio": (1e-4, 100),
}


@dataclass(frozen=True)
class Quantity:
    """A number as it was written, with its unit and the name of its source in the profile."""

    value: float
    unit: str
    dimension: str
    source: str

    @property
    def basic(self) -> float:
        """The value in basic units: op/s, B, B/s, s, J/B, J/op, W, Hz."""
        return self.value * UNITS[self.dimension][self.unit]

    def __str__(self) -> str:
        return f"{self.value:g}{'' if self.unit == '1' else ' ' + self.unit}"
