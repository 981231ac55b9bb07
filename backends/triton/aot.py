"""Compiles launches ahead of time, without a GPU, and says what each binary takes.

Triton's compiler accepts a block that takes more shared memory than the chip has, and does not say
how many registers were used or spilled: both are read from the binary here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mopt.backends.triton.architectures import Architecture
from mopt.backends.triton.launch import Launch
from mopt.errors import LoweringError

if TYPE_CHECKING:
    from mopt.cache import Cache

OLDEST = (3, 3)
# 3.10 changes the default, and the numbers with it.
_OPTIONS = {"enable_fp_fusion": True}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_AMD = {
    "registers": re.compile(r"\.vgpr_count:\s+(\d+)"),
    "spills": re.compile(r"\.vgpr_spill_count:\s+(\d+)"),
}


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: what to load, how to launch it, what it takes.

    ``threads`` are those of a block; ``spills`` bytes of stack a thread (on AMD: registers).
    ``order`` names the arguments in the order of the launch, ``types`` their types.
    """

    name: str
    architecture: str
    code: bytes
    assembly: str
    shared: int
    threads: int
    registers: int
    spills: int
    scratch: int
    order: tuple[str, ...]
    types: tuple[str, ...]
    aligned: tuple[str, ...]
    constants: Mapping[str, str] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    def refusal(self, arch: Architecture) -> str | None:
        """Why this binary is not worth keeping, or None."""
        if self.shared > arch.shared:
            return f"takes {self.shared} bytes of shared memory, {arch.name} has {arch.shared}"
        if self.spills:
            return f"spills {self.spills} bytes a thread"
        return None


def triton_version() -> str:
    """The installed version. Raises LoweringError ``triton-version`` for one that is too old."""
    found = version("triton")
    parts = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if parts < OLDEST:
        raise LoweringError(
            f"triton {found} is installed, kernels need {OLDEST[0]}.{OLDEST[1]} or later",
            code="triton-version",
            hint="pip install -U triton",
        )
    return found


def compile_launch(launch: Launch, arch: Architecture, cache: Cache | None = None) -> Binary:
    """The binary of a launch for an architecture, from the cache where it was compiled before.

    Raises LoweringError ``kernel-compile`` with the compiler's own words.
    """
    key = {"launch": launch.key(), "arch": arch.name, "triton": triton_version()}
    if cache is None:
        return _read(*_compile(launch, arch))
    return _read(*cache.remember_tensors("triton-binary", key, lambda: _compile(launch, arch)))


def _read(files: Mapping[str, Tensor], facts: dict[str, Any]) -> Binary:
    names = ("order", "types", "aligned")
    lists = {name: tuple(facts[name]) for name in names}
    code, assembly = (files[name].numpy().tobytes() for name in ("code", "assembly"))
    return Binary(code=code, assembly=assembly.decode(), **{**facts, **lists})


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _compile(launch: Launch, arch: Architecture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Code and assembly as bytes, and everything else about a binary."""
    import triton
    from triton.compiler import ASTSource

    function = launch.function
    types = launch.types()
    constants = {**launch.constants, "ARCH": arch.number}
    index = {name: i for i, name in enumerate(function.arg_names)}
    missing = set(index) ^ (set(types) | set(constants))
    assert not missing, (launch.name, missing)
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in function.arg_names},
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in launch.aligned()},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, **_OPTIONS}
    try:
        with triton.knobs.compilation.scope():
            # Line tables are four fifths of a binary.
            triton.knobs.compilation.disable_line_info = True
            made = triton.compile(source, target=arch.gpu_target(), options=options)
    except Exception as error:  # the compiler raises errors of many kinds, from many layers
        raise LoweringError(
            f"{launch.name} does not compile for {arch.name}: {_last_line(error)}",
            code="kernel-compile",
            hint=f"constants {dict(launch.constants)}, types {types}",
        ) from error
    code, assembly = made.asm[arch.binary], made.asm[arch.assembly]
    registers, spills = _resources(code, assembly, arch)
    order = tuple(name for name in function.arg_names if name in types)
    facts = {
        "name": made.metadata.name,
        "architecture": arch.name,
        "shared": made.metadata.shared,
        "threads": made.metadata.num_warps * arch.warp,
        "registers": registers,
        "spills": spills,
        "scratch": made.metadata.global_scratch_size or 0,
        "order": order,
        "types": tuple(types[name] for name in order),
        "aligned": launch.aligned(),
        "constants": {name: str(value) for name, value in launch.constants.items()},
        "warps": launch.warps,
        "stages": launch.stages,
    }
    return {"code": _bytes(code), "assembly": _bytes(assembly.encode())}, facts


def _resources(code: bytes, assembly: str, arch: Architecture) -> tuple[int, int]:
    if not arch.is_nvidia:
        found = {name: pattern.search(assembly) for name, pattern in _AMD.items()}
        return tuple(int(m.group(1)) if m else 0 for m in found.values())  # type: ignore[return-value]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code)
        done = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    usage = _USAGE.search(done.stdout)
    if usage is None:
        raise LoweringError(
            f"cuobjdump does not tell the registers of a binary: {done.stderr.strip()[:200]}",
            code="kernel-resources",
        )
    return int(usage.group(1)), int(usage.group(2))


def _cuobjdump() -> str:
    import triton.backends.nvidia as nvidia

    return str(Path(nvidia.__path__[0]) / "bin" / "cuobjdump")


def _last_line(error: BaseException) -> str:
    """The compiler's complaint: the last line that is more than a mark under the source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return lines[-1][:300] if lines else type(error).__name__
