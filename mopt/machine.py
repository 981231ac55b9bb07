"""What a measured time belongs to: machine and versions, without names of hosts or users."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# The flags that decide which kernels a runtime picks, as /proc/cpuinfo writes them.
_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8",
    "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip
_RUNTIMES = ("torch", "onnxruntime", "onnx", "numpy", "triton")
# A time measured with one of these different cannot be compared.
_DECISIVE = ("cpu", "isa", "cores", "quota", "threads", "versions")

# Load for each core from which on other work is in the way; a compile of one's own gives 1.
_CROWDED = 1.25


def machine_fingerprint(threads: int | None = None) -> dict[str, Any]:
    """The facts a time depends on, as plain JSON data. Imports nothing heavy.

    Keys: ``cpu`` (model name), ``isa`` (relevant instruction sets), ``cores`` (those this process
    may use), ``quota`` (CPUs a cgroup allows, or null), ``memory_bytes``, ``threads`` (given; null
    is the runtime's own choice), ``governor`` (or null), ``kernel``, ``python`` and ``versions``.
    """
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "isa": [flag for flag in _FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "quota": _cgroup_quota(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "threads": threads,
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: found for name in _RUNTIMES if (found := _version(name))},
    }


def is_crowded() -> bool:
    """Whether more work than there are cores has been waiting for them in the last minute.

    Threads that wait for each other after every small operation then take many times as long as
    one thread alone.
    """
    return os.getloadavg()[0] > _CROWDED * (os.cpu_count() or 1)


def machine_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Why times of two fingerprints cannot be compared, in words; empty when they can."""
    return [
        f"{key}: {_words(one.get(key))} and {_words(other.get(key))}"
        for key in _DECISIVE
        if one.get(key) != other.get(key)
    ]


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in sorted(value.items()))
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cpu() -> tuple[str, set[str]]:
    name, flags = platform.machine(), set[str]()
    for line in _text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            return name, set(value.split())
    return name, flags


def _cgroup_quota() -> float | None:
    fields = _text("/sys/fs/cgroup/cpu.max").split()
    if len(fields) == 2 and fields[0].isdigit():
        return int(fields[0]) / int(fields[1])
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _first_line(path: str) -> str | None:
    return _text(path).partition("\n")[0].strip() or None


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can.

    Large temporary values, as loading a model makes them, otherwise stay with the process.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
