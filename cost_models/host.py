"""The machine mopt runs on, as a device."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mopt.cost_models.runtime import session_settings
from mopt.device import DeviceProfile, find_device
from mopt.device_file import SCHEMA
from mopt.machine import machine_fingerprint
from mopt.quantity import Quantity

if TYPE_CHECKING:
    from mopt.pass_base import Progress

BRIEF_SECONDS = 30.0
# From the most to the least capable: the instruction set that decides, and the class it means.
_CLASSES = (
    ("amx_int8", "cpu-amx"),
    ("avx512_vnni", "cpu-avx512-vnni"),
    ("asimddp", "cpu-cortex-a76"),
)


def class_profile() -> DeviceProfile:
    """The class of processor this machine has, with its own number of cores. Nothing is measured.

    Rates and caches per core are those of the class, and so is the memory's bandwidth as a whole.
    """
    machine = machine_fingerprint()
    name = next((name for flag, name in _CLASSES if flag in machine["isa"]), "cpu-avx2")
    profile = find_device(name)
    (processor,) = profile.processors
    assert processor.units is not None
    share = machine["cores"] / processor.units.basic
    scaled = replace(
        processor,
        units=replace(processor.units, value=machine["cores"]),
        peak={key: _times(rate, share) for key, rate in processor.peak.items()},
    )
    return replace(
        profile,
        id="cpu",
        name=f"{profile.name.partition(' (')[0]}, {machine['cores']} cores",
        aliases=(profile.id,),
        processors=(scaled,),
        is_host=True,
    )


def _times(quantity: Quantity, factor: float) -> Quantity:
    return replace(quantity, value=quantity.value * factor)


def host_profile(*, calibrate: bool = False, progress: Progress | None = None) -> DeviceProfile:
    """This machine from its stored calibration, else its class; see ``mopt.device.find_device``."""
    path = calibration_path()
    if path.is_file():
        from mopt.device_file import read_device

        return replace(read_device(path), is_host=True)
    if calibrate:
        from mopt.cost_models.calibrate import calibrate as measure

        profile = measure(BRIEF_SECONDS, progress=progress)
        store_profile(profile)
        return profile
    return replace(class_profile(), id="host")


def store_profile(profile: DeviceProfile) -> Path:
    """Keep a calibration of this machine for ``host``; where it is kept."""
    from mopt.device_text import device_toml
    from mopt.files import write_file_atomic

    path = calibration_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file_atomic(path, device_toml(profile).encode())
    return path


def calibration_path() -> Path:
    """Where this machine's calibration is kept: by machine, versions and session options."""
    from platformdirs import user_cache_path

    machine = machine_fingerprint()
    facts = {key: machine[key] for key in ("cpu", "isa", "cores", "quota", "versions")}
    facts["session"] = session_settings()
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache_path("mopt") / f"devices-v{SCHEMA}" / f"host-{digest}.toml"
