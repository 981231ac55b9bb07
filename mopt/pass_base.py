"""What a pass is: a frozen dataclass whose fields are its options.

The pipeline gives ``run`` a copy of the program and checks what the pass claims about it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from mopt.errors import LimitError, UsageError, quote

if TYPE_CHECKING:
    from mopt.allowance import Allowance
    from mopt.budget import Budget
    from mopt.cache import Cache
    from mopt.calibration import Calibration
    from mopt.choice import Baseline, Observation
    from mopt.cost import CostModel
    from mopt.device import DeviceProfile
    from mopt.program import Program


# What a pass says whose requirement is data; after "method ..." or alone.
NEEDS_DATA = "needs calibration data; pass calibration=[inputs, ...] (or --calib)"


class Numerics(Enum):
    """What a pass does to the numbers a program computes."""

    EXACT = "exact"  # bit for bit the same
    ROUNDING = "rounding"  # the same function, other rounding: bounded
    LOSSY = "lossy"  # another function: measured and reported


@dataclass(frozen=True)
class Skip:
    """A site a pass declined, with a reason a user can act on."""

    site: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did. ``changed`` is checked against the program's fingerprint."""

    changed: bool
    stats: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[Skip, ...] | list[Skip] = ()


class Progress:
    """Where long work says how far it is; this one says nothing."""

    def stage(self, name: str, detail: str = "") -> None:
        """A stage of the compile begins."""

    def step(self, done: int, total: int, unit: str) -> None:
        """``done`` of ``total`` items of the current stage are finished."""

    def end(self, detail: str = "") -> None:
        """The current stage is finished."""


@dataclass(frozen=True)
class PassContext:
    """What a pass may ask: device, cost model, data, randomness, time.

    ``evaluate`` maps a callable with the model's inputs to the user's metric, higher or lower being
    better as the metric says. ``deadline`` is on ``time.monotonic``. ``budget``, ``baseline``,
    ``observations`` and ``allow_slower`` are for passes that choose under a budget; ``cache`` keeps
    what they measure, None keeps nothing. ``allowance`` is what the whole compile may take.
    ``unrounded`` is the program before its first lossy pass,
    set by the pipeline unless given: what passes that repair rounding compare with, and never edit.
    """

    device: DeviceProfile | None = None
    cost_model: CostModel | None = None
    calibration: Calibration | None = None
    evaluate: Callable[..., Any] | None = None
    progress: Progress = field(default_factory=Progress)
    seed: int = 0
    deadline: float | None = None
    max_memory_bytes: int | None = None
    backend: str = "onnx"
    budget: Budget | None = None
    baseline: Baseline | None = None
    observations: tuple[Observation, ...] = ()
    allow_slower: bool = False
    cache: Cache | None = None
    allowance: Allowance | None = None
    unrounded: Program | None = None

    def check_time(self, doing: str) -> None:
        """Raise LimitError when the compile's time is up, or it holds more memory than it may."""
        if self.allowance is not None:
            self.allowance.check(doing)
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise LimitError(
                f"time is up while {doing}",
                code="max-minutes",
                hint="raise --max-minutes, or use a recipe that calibrates less",
            )


def option(
    default: Any,
    *,
    help: str,
    min: float | None = None,
    max: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A dataclass field that is an option of a pass: its default, limits and one-line help."""
    return field(
        default=default, metadata={"help": help, "min": min, "max": max, "choices": choices}
    )


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Base of all passes. Subclasses implement :meth:`run` and are registered by name.

    ``requires`` and ``ensures`` are checked by the pipeline before and after: each returns a
    reason when the fact does not hold, else None.
    """

    pass_name: ClassVar[str] = ""
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    tolerance: ClassVar[float] = 0.0
    # Whether it decides under the budget, and is asked again with what came of it.
    chooses: ClassVar[bool] = False

    layers: str = option("*", help="only layers whose path matches one of these globs (a,b)")
    skip: str = option("", help="leave layers alone whose path matches one of these globs (a,b)")
    optional: bool = option(False, help="where something it needs is missing, go on without it")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            check_option(self.pass_name or type(self).__name__, spec, getattr(self, spec.name))

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        """Why the pass cannot run on this program, or None."""
        return None

    def ensures(self, program: Program, ctx: PassContext) -> str | None:
        """What the pass promised and did not do, or None."""
        return None

    def notice(self, backend: str) -> str | None:
        """What its user should know before anything runs, on that backend, or None."""
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Edit ``program`` in place and say what changed."""
        raise TypeError(f"{type(self).__name__} does not define run")

    def selects(self, path: str) -> bool:
        """Whether the options ``layers`` and ``skip`` let the pass touch a layer."""
        return _matches(path, self.layers) and not _matches(path, self.skip)

    def options(self) -> dict[str, Any]:
        """All options with their values, defaults included."""
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}

    def changed_options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        return {k: v for k, v in self.options().items() if v != defaults[k]}


def _matches(path: str, globs: str) -> bool:
    patterns = [glob.strip() for glob in globs.split(",") if glob.strip()]
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def check_option(owner: str, spec: dataclasses.Field[Any], value: Any) -> None:
    """Raise UsageError when a value is outside what its option allows."""
    limits = spec.metadata
    wanted = None
    if limits.get("choices") is not None and value not in limits["choices"]:
        wanted = "one of " + ", ".join(repr(choice) for choice in limits["choices"])
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return
    elif not math.isfinite(value):
        wanted = "a finite number"
    elif limits.get("min") is not None and value < limits["min"]:
        wanted = f"at least {limits['min']}"
    elif limits.get("max") is not None and value > limits["max"]:
        wanted = f"at most {limits['max']}"
    if wanted:
        raise UsageError(
            f"{owner}: option {spec.name} is {quote(value)}, expected {wanted}",
            code="bad-option",
            hint=f"mopt passes explain {owner}",
        )


def coerce_option(owner: str, cls: type[Pass], name: str, value: Any) -> Any:
    """A value from text or TOML in the type the option is declared with."""
    hint = get_type_hints(cls)[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        if kind is type(None):
            if value is None or value in ("none", ""):
                return None
        elif kind is bool:
            if isinstance(value, bool):
                return value
            if str(value).lower() in ("true", "yes", "1", "false", "no", "0"):
                return str(value).lower() in ("true", "yes", "1")
        elif kind in (int, float):
            if isinstance(value, bool):
                continue
            try:
                return kind(value)
            except (TypeError, ValueError, OverflowError):
                continue
        elif kind is str and isinstance(value, str):
            return value
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise UsageError(
        f"{owner}: option {name} is {quote(value)}, expected {names}",
        code="bad-option",
        hint=f"mopt passes explain {owner}",
    )


P = TypeVar("P", bound=type[Pass])


def register_pass(name: str, *, numerics: Numerics, tolerance: float = 0.0) -> Callable[[P], P]:
    """Name a pass and state its numerics.

    ``tolerance`` bounds a rounding pass on 32-bit values: the largest difference of any output,
    relative to that output's largest magnitude.
    """

    def decorate(cls: P) -> P:
        cls.pass_name = name
        cls.numerics = numerics
        cls.tolerance = tolerance
        return cls

    return decorate
