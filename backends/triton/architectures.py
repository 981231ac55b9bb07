"""The GPU architectures that kernels are compiled for, and what bounds a block on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mopt.errors import LoweringError, unknown_name


@dataclass(frozen=True)
class Architecture:
    """``number`` is what kernels see as ``ARCH``; ``shared`` the bytes a block may take."""

    name: str
    number: int
    shared: int
    registers: int
    warp: int = 32

    @property
    def is_nvidia(self) -> bool:
        """Whether the binary is a cubin; else it is an AMD code object."""
        return self.name.startswith("sm_")

    @property
    def binary(self) -> str:
        """The kind of binary Triton makes, which is also the file's ending."""
        return "cubin" if self.is_nvidia else "hsaco"

    @property
    def assembly(self) -> str:
        """The kind of readable code Triton makes."""
        return "ptx" if self.is_nvidia else "amdgcn"

    def gpu_target(self) -> Any:
        """Triton's own description."""
        from triton.backends.compiler import GPUTarget

        if self.is_nvidia:
            return GPUTarget("cuda", self.number, self.warp)
        return GPUTarget("hip", self.name, self.warp)


# CUDA programming guide, table of technical specifications; AMD CDNA3 ISA guide.
ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("sm_80", 80, 166_912, 255),
        Architecture("sm_89", 89, 101_376, 255),
        Architecture("sm_90", 90, 232_448, 255),
        Architecture("gfx942", 942, 65_536, 512, 64),
    )
}
NVIDIA = ("sm_80", "sm_89", "sm_90")

# Binaries run on later chips of the same generation, so a newer one takes the nearest below.
_DEVICES = {
    "a100": "sm_80", "rtx4090": "sm_89", "l4": "sm_89", "h100": "sm_90", "h200": "sm_90",
    "mi300x": "gfx942",
}  # fmt: skip


def find_architecture(name: str) -> Architecture:
    """An architecture by name. Raises UsageError ``unknown-architecture``."""
    if name not in ARCHITECTURES:
        raise unknown_name("architecture", name, ARCHITECTURES, "docs/triton.md")
    return ARCHITECTURES[name]


def architecture_of(device: str) -> Architecture:
    """The architecture of a device of mopt (``mopt devices list``), or of this machine's GPU.

    Raises LoweringError ``no-gpu-target`` for a device that is none.
    """
    if device == "host":
        return _host()
    if device not in _DEVICES:
        raise LoweringError(
            f"the Triton backend has no architecture for {device!r}",
            code="no-gpu-target",
            hint="-t takes one of " + ", ".join(_DEVICES),
        )
    return ARCHITECTURES[_DEVICES[device]]


def running_architecture(major: int, minor: int) -> Architecture | None:
    """The architecture whose binaries a GPU of that compute capability runs, None for others."""
    best = None
    for name in NVIDIA:
        arch = ARCHITECTURES[name]
        if arch.number // 10 == major and arch.number <= 10 * major + minor:
            best = arch
    return best


def _host() -> Architecture:
    import torch

    if not torch.cuda.is_available():
        raise LoweringError(
            "this machine has no GPU that PyTorch can use",
            code="no-gpu-target",
            hint="name the GPU to compile for: -t h200; its kernels are compiled here all the same",
        )
    major, minor = torch.cuda.get_device_capability()
    found = running_architecture(major, minor)
    if found is None:
        raise LoweringError(
            f"kernels are compiled for {', '.join(NVIDIA)}; this GPU has capability "
            f"{major}.{minor}",
            code="no-gpu-target",
        )
    return found
