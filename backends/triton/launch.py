"""A kernel launch as data: what is run, on which grid, with which arguments and constants.

A kernel's wrapper allocates its outputs and hands one or more launches to a *runner*. Who that is
decides what happens: the interpreter computes them on the CPU, a recorder only notes them (with
tensors on the ``meta`` device, so that they can be compiled ahead of time), and on a GPU they run
from Triton's compiler or from binaries in an artifact.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Sizes of these names change from run to run or layer to layer: nothing is assumed about them.
FREE = frozenset({
    "rows", "keys", "queries", "units", "share", "groups", "parts", "seed", "row_step", "offset",
    "m_batch", "m_head", "m_token",
})  # fmt: skip
ALIGNMENT = 16
TYPE_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.float64: "fp64",
}  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A configuration of a kernel: its block sizes, warps and pipeline stages."""

    sizes: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2

    @property
    def constants(self) -> dict[str, int]:
        """The block sizes by the kernel's own names."""
        return dict(self.sizes)

    def __getitem__(self, name: str) -> int:
        return self.constants[name]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}{value}" for name, value in self.sizes)
        return f"{sizes} w{self.warps} s{self.stages}"

    def as_json(self) -> dict[str, Any]:
        """Plain data; :func:`read_tile` is the inverse."""
        return {"sizes": [list(pair) for pair in self.sizes], "warps": self.warps,
                "stages": self.stages}  # fmt: skip


def read_tile(data: Mapping[str, Any]) -> Tile:
    """A tile from :meth:`Tile.as_json`."""
    sizes = tuple((str(name), int(value)) for name, value in data["sizes"])
    return Tile(sizes, int(data["warps"]), int(data["stages"]))


def tile(warps: int, stages: int, **sizes: int) -> Tile:
    """A tile from its sizes by name."""
    return Tile(tuple(sizes.items()), warps, stages)


@dataclass(frozen=True)
class Launch:
    """One launch: ``function`` is a Triton function, ``arguments`` tensors and numbers by name.

    ``constants`` are compiled in; ``outputs`` names the tensors that the kernel writes.
    """

    function: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    outputs: tuple[str, ...]
    warps: int = 4
    stages: int = 2
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kernel's name in messages and binaries."""
        found: str = self.function.fn.__name__
        return found

    def types(self) -> dict[str, str]:
        """The Triton type of every argument that is not compiled in."""
        return {name: type_name(value) for name, value in self.arguments.items()}

    def aligned(self) -> tuple[str, ...]:
        """Arguments that are taken to be multiples of 16: all pointers, and sizes that are."""
        return tuple(
            name for name, value in self.arguments.items()
            if isinstance(value, Tensor)
            or (isinstance(value, int) and name not in FREE and value % ALIGNMENT == 0)
        )  # fmt: skip

    def key(self) -> str:
        """What tells one binary from another, before the architecture."""
        text = json.dumps(
            [self.name, self.types(), self.aligned(), sorted((k, str(v)) for k, v in
             self.constants.items()), self.warps, self.stages, source_hash(self.function)],
        )  # fmt: skip
        return hashlib.sha256(text.encode()).hexdigest()[:24]


Runner = Callable[[Launch], None]


def type_name(value: Any) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(value, Tensor):
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


@cache
def source_hash(function: Any) -> str:
    """A hash of the file a kernel stands in and of the decoders that kernels share."""
    own = Path(inspect.getsourcefile(function.fn) or "")
    shared = sorted(own.parent.glob("_*.py"))
    digest = hashlib.sha256()
    for path in (own, *shared):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Recorder:
    """Notes launches and runs none: what a model will need is found on ``meta`` tensors."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def __call__(self, launch: Launch) -> None:
        self.launches.setdefault(launch.key(), launch)
