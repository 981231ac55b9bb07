"""Budgets: what the user demands of the result, and what is to be made least.

Grammar: ``size<=25MB``, ``latency<=8ms``, ``latency<=0.5x``, ``memory<=64MiB``, ``energy<=5mJ``,
``quality>=0.99x``, ``minimize=size|latency|loss``. ``x`` means a multiple of the uncompressed
model's value. ``quality>=0.99`` without a unit is read as ``0.99x``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mopt.errors import UsageError, quote, unknown_name
from mopt.quantity import BYTES

_UNITS: dict[str, dict[str, float]] = {
    "size": BYTES,
    "memory": BYTES,
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "energy": {"uJ": 1e-3, "mJ": 1.0, "J": 1e3},
    "quality": {},
}  # fmt: skip
_PATTERN = re.compile(r"\s*([a-z]+)\s*(<=|>=|=|<|>)\s*([0-9.eE+-]+)\s*([A-Za-z]*)\s*")
OBJECTIVES = ("size", "latency", "loss")


@dataclass(frozen=True)
class Constraint:
    """``what`` is at most (at least, for quality) ``value``.

    ``value`` is in bytes, ms or mJ, or a multiple of the uncompressed model's when ``relative``.
    """

    what: str
    value: float
    relative: bool
    text: str

    def limit(self, baseline: float) -> float:
        """The limit in absolute terms, given the uncompressed model's value."""
        return self.value * baseline if self.relative else self.value

    def is_met(self, value: float, baseline: float) -> bool:
        """Whether a measured value satisfies the constraint."""
        limit = self.limit(baseline)
        return value >= limit if self.what == "quality" else value <= limit


@dataclass(frozen=True)
class Budget:
    """All constraints, one a quantity, and what to minimize among the models that meet them."""

    constraints: tuple[Constraint, ...] = ()
    minimize: str | None = None

    @staticmethod
    def parse(texts: Iterable[str] | str | Budget | None) -> Budget:
        """Read budgets as given on the command line. Raises UsageError for anything unclear."""
        if isinstance(texts, Budget):
            return texts
        items = [texts] if isinstance(texts, str) else list(texts or ())
        found: dict[str, Constraint] = {}
        minimize: str | None = None
        for text in items:
            if text.replace(" ", "").startswith("minimize="):
                wanted = text.partition("=")[2].strip()
                if wanted not in OBJECTIVES:
                    raise unknown_name("objective", wanted, OBJECTIVES, "mopt compile --help")
                if minimize not in (None, wanted):
                    raise UsageError(
                        f"both minimize={minimize} and minimize={wanted}: one can be made least",
                        code="contradictory-budget",
                        hint=f"limit the other: --budget '{wanted}<=0.5x'",
                    )
                minimize = wanted
                continue
            constraint = _parse_one(text)
            if constraint.what in found:
                raise UsageError(
                    f"two budgets for {constraint.what}: {quote(found[constraint.what].text)} and "
                    f"{quote(text)}",
                    code="contradictory-budget",
                    hint="keep the stricter one",
                )
            found[constraint.what] = constraint
        return Budget(tuple(found.values()), minimize)

    def get(self, what: str) -> Constraint | None:
        """The constraint on a quantity, if there is one."""
        return next((c for c in self.constraints if c.what == what), None)

    @property
    def default_recipe(self) -> str:
        """The recipe where none is named: under a budget, formats are chosen layer by layer."""
        return "auto" if self.constraints or self.minimize else "int8-dynamic"

    def texts(self) -> list[str]:
        """The budget as it was given."""
        texts = [c.text for c in self.constraints]
        return texts + ([f"minimize={self.minimize}"] if self.minimize else [])


def _parse_one(text: str) -> Constraint:
    match = _PATTERN.fullmatch(text)
    if not match:
        raise UsageError(
            f"budget {quote(text)} is not understood",
            code="bad-budget",
            hint="write for example 'size<=25MB', 'latency<=0.5x' or 'quality>=0.99'",
        )
    what, sign, number, unit = match.groups()
    if what not in _UNITS:
        raise unknown_name("budget", what, _UNITS, "size, latency, memory, energy, quality")
    wanted = ">=" if what == "quality" else "<="
    if sign != wanted:
        raise UsageError(
            f"budget {quote(text)}: {what} is limited with {wanted}, found {sign}",
            code="bad-budget",
        )
    try:
        value = float(number)
    except ValueError as error:
        raise UsageError(
            f"budget {quote(text)}: {quote(number)} is not a number", code="bad-budget"
        ) from error
    if not 0 < value < float("inf"):
        raise UsageError(f"budget {quote(text)}: the limit must be positive", code="bad-budget")
    if unit == "x" or (what == "quality" and not unit):
        return Constraint(what, value, True, text.strip())
    if unit not in _UNITS[what]:
        units = ", ".join([*_UNITS[what], "x"])
        raise UsageError(
            f"budget {quote(text)}: unit {quote(unit)} is not one of {units}",
            code="bad-budget-unit",
            hint="for example 'size<=25MB', 'latency<=8ms', 'latency<=0.5x'",
        )
    return Constraint(what, value * _UNITS[what][unit], False, text.strip())
