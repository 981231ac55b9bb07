"""What measuring a device found: curves fitted to times of its operators, and how sure they are.

Data only; ``mopt.cost_models.fit`` makes these and computes with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopt.cost import Work
    from mopt.device_fields import FieldReader, Place

Dims = tuple[int, ...]
_LARGEST = 2.0**52
_TINY = 1e-15


@dataclass(frozen=True)
class Point:
    """One timing of an operator; ``noise`` is its standard error as a share of the time."""

    dims: Dims
    microseconds: float
    noise: float


@dataclass(frozen=True)
class Rates:
    """The roofline of a family: what it takes to compute, to move weights, inputs and outputs.

    Rates are per second, ``launch`` is in seconds; the terms overlap as
    ``(sum of term ** overlap) ** (1 / overlap)``.
    """

    operations: float
    weights: float
    inputs: float
    outputs: float
    pieces: float
    launch: float
    overlap: float


@dataclass(frozen=True)
class FamilyFit:
    """What was found for one family of operators.

    The time is that of the roofline times ``exp`` of a Gaussian process; ``lengths`` (octaves),
    ``signal`` and ``noise`` describe that, ``inflation`` makes its bands hold on timings left out
    of a fit. ``median_error`` and ``error_90`` are of such timings (|log ratio|), NaN where there
    were too few to leave any out.
    """

    family: str
    rates: Rates
    lengths: tuple[float, ...]
    signal: float
    noise: float
    inflation: float
    points: tuple[Point, ...]
    median_error: float = math.nan
    error_90: float = math.nan


@dataclass(frozen=True)
class CallOverhead:
    """What a call of a model takes besides its operators, in microseconds."""

    call_us: float = 0.0
    input_us: float = 0.0
    output_bytes_per_us: float = 1e9

    def milliseconds(self, inputs: int, output_bytes: float) -> float:
        """For a number of inputs, and bytes of outputs that are copied out."""
        copying = output_bytes / self.output_bytes_per_us
        return 1e-3 * (self.call_us + self.input_us * inputs + copying)


@dataclass(frozen=True)
class Handover:
    """What operators take in a model beyond what they take alone, in microseconds.

    For each byte of inputs and outputs, of weights in floats and of weights in fewer bits; for each
    byte that convolutions move, which compute so much for it that less of it shows; and for each
    operator. See ``mopt.cost_models.handover``.
    """

    activation_us: float = 0.0
    weight_us: float = 0.0
    code_us: float = 0.0
    convolution_us: float = 0.0
    operator_us: float = 0.0

    def milliseconds(self, work: Work) -> float:
        """For one operator."""
        parts = zip(astuple(self), handed_over(work), strict=True)
        return 1e-3 * sum(us * amount for us, amount in parts)


def handed_over(work: Work) -> tuple[float, float, float, float, float]:
    """What each field of ``Handover`` is multiplied with."""
    # The bytes of a recurrent layer are those of all its steps, which hand nothing over.
    if work.kind in ("free", "recurrent"):
        return (0.0, 0.0, 0.0, 0.0, 1.0)
    if work.kind == "convolution":
        return (0.0, 0.0, 0.0, work.bytes, 1.0)
    is_plain = work.weight_format == "fp32"
    weights = (work.weight_bytes, 0.0) if is_plain else (0.0, work.weight_bytes)
    return (work.activation_bytes, *weights, 0.0, 1.0)


@dataclass(frozen=True)
class Calibration:
    """All of it, and the circumstances: ``machine`` as ``mopt.machine`` describes it.

    ``disturbed`` is the share of timings that were discarded, ``quiet`` that of single runs that
    never waited for a processor, ``load`` the load average before. ``node_us`` is what an operator
    takes that does nothing. ``error_90`` is of held-out operators of all families.
    """

    date: str
    runtime: str
    threads: int
    seconds: float
    load: float
    disturbed: float
    quiet: float
    node_us: float
    call: CallOverhead
    handover: Handover
    median_error: float
    error_90: float
    machine: Mapping[str, Any]
    fits: tuple[FamilyFit, ...]

    def as_table(self) -> dict[str, Any]:
        """Plain data for a TOML file."""
        plain = asdict(self)
        del plain["fits"]
        plain["machine"] = _plain(self.machine)
        plain["family"] = {fit.family: _fit_table(fit) for fit in self.fits}
        return plain


def _plain(value: Any) -> Any:
    """Without what TOML cannot say: an absent value."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value


def _fit_table(fit: FamilyFit) -> dict[str, Any]:
    table: dict[str, Any] = {
        "rates": [_short(value) for value in astuple(fit.rates)],
        "lengths": [_short(value) for value in fit.lengths],
        "signal": _short(fit.signal),
        "noise": _short(fit.noise),
        "inflation": _short(fit.inflation),
        "dims": [list(point.dims) for point in fit.points],
        "us": [_short(point.microseconds) for point in fit.points],
        "us-noise": [_short(point.noise) for point in fit.points],
    }
    if not math.isnan(fit.median_error):
        table |= {"median-error": _short(fit.median_error), "error-90": _short(fit.error_90)}
    return table


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def read_calibration(reader: FieldReader, given: Any) -> Calibration:
    """The ``[calibration]`` of a profile. Raises InputError naming the field and its line."""
    at: Place = ("calibration",)
    numbers = ("seconds", "load", "disturbed", "quiet", "node_us", "median_error", "error_90")
    names = (*numbers, "date", "runtime", "threads", "call", "handover", "machine", "family")
    reader.only(at, given, required=names)
    return Calibration(
        date=reader.text((*at, "date"), given["date"]),
        runtime=reader.text((*at, "runtime"), given["runtime"]),
        threads=int(reader.number((*at, "threads"), given["threads"], 0, 4096)),
        call=CallOverhead(*_read_numbers(reader, (*at, "call"), given["call"], CallOverhead)),
        handover=Handover(*_read_numbers(reader, (*at, "handover"), given["handover"], Handover)),
        machine=reader.table((*at, "machine"), given["machine"]),
        fits=tuple(
            _read_fit(reader, (*at, "family", name), name, table)
            for name, table in reader.table((*at, "family"), given["family"]).items()
        ),
        **{key: reader.number((*at, key), given[key], 0, _LARGEST) for key in numbers},
    )


def _read_numbers(
    reader: FieldReader, at: Place, given: Any, kind: type[CallOverhead] | type[Handover]
) -> list[float]:
    """The fields of a table of numbers, in the order of ``kind``."""
    table = reader.table(at, given)
    names = tuple(spec.name for spec in fields(kind))
    reader.only(at, table, required=names)
    return [reader.number((*at, name), table[name], 0, 1e12) for name in names]


def _read_fit(reader: FieldReader, at: Place, name: str, table: Any) -> FamilyFit:
    required = ("rates", "lengths", "signal", "noise", "inflation", "dims", "us", "us-noise")
    reader.only(at, table, required=required, optional=("median-error", "error-90"))
    rates = reader.numbers((*at, "rates"), table["rates"], _TINY, _LARGEST)
    if len(rates) != len(fields(Rates)):
        raise reader.error((*at, "rates"), f"has {len(rates)} numbers, expected 7")
    lengths = reader.numbers((*at, "lengths"), table["lengths"], 0.01, 1e3)
    times = reader.numbers((*at, "us"), table["us"], 1e-4, 1e12)
    noises = reader.numbers((*at, "us-noise"), table["us-noise"], 0, 10)
    dims = table["dims"]
    if not isinstance(dims, list) or not len(dims) == len(times) == len(noises) > 0:
        raise reader.error((*at, "dims"), "must be as long as us and us-noise, and not empty")
    sizes = [reader.numbers((*at, "dims"), entry, 1, _LARGEST) for entry in dims]
    if len({len(entry) for entry in sizes}) > 2:
        raise reader.error((*at, "dims"), "has entries of many lengths")
    points = (
        Point(tuple(int(size) for size in entry), time, noise)
        for entry, time, noise in zip(sizes, times, noises, strict=True)
    )
    single = {key: reader.number((*at, key), table[key], 0, 1e3)
              for key in ("signal", "noise", "inflation")}  # fmt: skip
    errors = [
        reader.number((*at, key), table[key], 0, 100) if key in table else math.nan
        for key in ("median-error", "error-90")
    ]
    return FamilyFit(
        family=name, rates=Rates(*rates), lengths=lengths, points=tuple(points),
        median_error=errors[0], error_90=errors[1], **single,
    )  # fmt: skip
