"""Devices: what they can compute and move, how fast and at what energy, and who says so.

    device = find_device("a100")
    device.processors[0].peak["fp16"].basic    # 3.12e14 operations per second
    device.source_of(device.processors[0].peak["fp16"]).title

Profiles are TOML files (``mopt.device_file``); those that come with mopt lie in
``cost_models/devices``. Adding a device means adding a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mopt.errors import UsageError, quote, unknown_name
from mopt.quantity import Quantity

if TYPE_CHECKING:
    from mopt.device_calibration import Calibration
    from mopt.pass_base import Progress

DEVICE_KINDS = ("cpu", "gpu", "npu", "mcu", "pim", "fpga", "hybrid")
SourceKind = Literal["data-sheet", "paper", "measurement", "derived", "estimate"]
SOURCE_KINDS = ("data-sheet", "paper", "measurement", "derived", "estimate")
# Operators with an efficiency of their own; those of ``mopt.cost.Work.kind`` that cost anything.
WORK_KINDS = (
    "linear", "matmul", "convolution", "attention", "embedding", "recurrent", "norm", "softmax",
    "pointwise", "pool", "reduce", "quantize", "move", "other",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where numbers of a profile come from, and as of when (``YYYY``, ``YYYY-MM`` or a day)."""

    name: str
    kind: SourceKind
    title: str
    date: str


@dataclass(frozen=True)
class MemoryTier:
    """One memory; ``managed`` by hardware (a cache) or by software."""

    name: str
    capacity: Quantity
    bandwidth: Quantity
    latency: Quantity
    energy: Quantity | None
    managed: Literal["hardware", "software"]
    read_only: bool = False


@dataclass(frozen=True)
class Link:
    """A way between two memory tiers, or between ``host`` and one."""

    start: str
    end: str
    bandwidth: Quantity
    latency: Quantity
    energy: Quantity | None


@dataclass(frozen=True)
class Efficiency:
    """How much of the peaks a kind of work reaches.

    ``compute`` and ``memory`` are fractions of peak rate and bandwidth, ``overlap`` the exponent p
    of ``(compute**p + memory**p)**(1/p)``: 1 is no overlap, large is perfect.
    """

    compute: Quantity
    memory: Quantity
    overlap: Quantity


@dataclass(frozen=True)
class Processor:
    """Something that computes: a CPU, the tensor cores of a GPU, logic beside a memory bank.

    ``peak`` is dense, a multiply-add counted as two, by number format. ``memory`` is the tier that
    weights stream from. ``arithmetic`` says in which number format work on ``half``,
    ``weight-only`` and ``dynamic`` weights is computed (``own``: in that of the weight). ``runs``
    are the kinds of work it can do (all when empty) on at most ``most_rows`` vectors at once.
    """

    name: str
    memory: str
    peak: Mapping[str, Quantity]
    launch: Quantity
    energy: Mapping[str, Quantity] = field(default_factory=dict)
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    runs: frozenset[str] = frozenset()
    most_rows: Quantity | None = None
    units: Quantity | None = None


@dataclass(frozen=True)
class DeviceProfile:
    """Everything known about a device.

    ``calibration`` holds what ``mopt devices calibrate`` measured and fitted, None for a device
    known from data sheets. ``backends`` are those
    that can lower for it here. ``is_host`` tells whether it is the machine mopt runs on.
    """

    id: str
    name: str
    kind: str
    summary: str
    processors: tuple[Processor, ...]
    memory: tuple[MemoryTier, ...]
    efficiency: Mapping[str, Efficiency]
    sources: Mapping[str, Source]
    links: tuple[Link, ...] = ()
    aliases: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    efficiency_class: str = ""
    power: Mapping[str, Quantity] = field(default_factory=dict)
    sustained: Quantity | None = None
    calibration: Calibration | None = None
    origin: str = ""
    is_host: bool = False

    def tier(self, name: str) -> MemoryTier:
        """A memory tier by name."""
        return next(tier for tier in self.memory if tier.name == name)

    def source_of(self, quantity: Quantity) -> Source:
        """Where a number of this profile comes from."""
        return self.sources[quantity.source]

    def peak(self, number_format: str) -> float:
        """The best dense rate of any processor in a number format, in operations per second."""
        rates = [p.peak[number_format].basic for p in self.processors if number_format in p.peak]
        return max(rates, default=0.0)


@cache
def _shipped() -> dict[str, Path]:
    from mopt.registry import package_folder

    folder = package_folder("mopt.cost_models.devices")
    return {path.stem: path for path in sorted(folder.glob("[!_]*.toml"))}


@cache
def _load_shipped(name: str) -> DeviceProfile:
    from mopt.device_file import read_device

    return read_device(_shipped()[name])


def list_devices() -> list[DeviceProfile]:
    """Every profile that comes with mopt, by id."""
    return [_load_shipped(name) for name in _shipped()]


def find_device(
    name_or_path: str | Path, *, calibrate: bool = False, progress: Progress | None = None
) -> DeviceProfile:
    """A device by id, alias or the path of a profile (a slash in it, or ending in ``.toml``).

    ``host`` is this machine, from its stored calibration; where there is none, ``calibrate`` makes
    a brief one (at most 40 seconds, once), and without it ``host`` is what ``cpu`` is: the class of
    processor that this machine has, from data sheets only. Raises UsageError ``unknown-device``, or
    InputError for a profile that is not sound, naming field, file and line.
    """
    from mopt.device_file import read_device

    text = str(name_or_path)
    if text.endswith(".toml") or "/" in text:
        if not Path(text).is_file():
            raise UsageError(f"no device profile {quote(text)}", code="missing-file")
        return read_device(text)
    if text in ("host", "cpu"):
        from importlib import import_module

        # Found by name: the core imports no cost model.
        host = import_module("mopt.cost_models.host")
        if text == "cpu":
            profile: DeviceProfile = host.class_profile()
        else:
            profile = host.host_profile(calibrate=calibrate, progress=progress)
        return profile
    if text in _shipped():
        return _load_shipped(text)
    names = {"host", "cpu"}
    for profile in list_devices():
        if text in profile.aliases:
            return profile
        names.update((profile.id, *profile.aliases))
    raise unknown_name("device", text, names, "mopt devices list")


def calibrate_host(
    seconds: float, *, threads: int | None = None, progress: Progress | None = None
) -> DeviceProfile:
    """Measure this machine for about ``seconds``; see ``mopt.cost_models.calibrate``.

    Raises LimitError ``calibration-failed`` where too little could be measured.
    """
    from importlib import import_module

    made = import_module("mopt.cost_models.calibrate")
    profile: DeviceProfile = made.calibrate(seconds, threads=threads, progress=progress)
    return profile


def keep_host_profile(profile: DeviceProfile) -> Path:
    """Make a calibration of this machine what ``host`` is from now on; where it is kept."""
    from importlib import import_module

    path: Path = import_module("mopt.cost_models.host").store_profile(profile)
    return path
