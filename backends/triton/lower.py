"""The Triton backend: compressed layers as GPU kernels, compiled ahead of time.

The artifact holds the graph and weights as the eager backend writes them, so it means the same on
every machine, and beside them tiles and binaries of the kernels that take the compressed layers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Protocol, cast

from torch import fx

from mopt.cache import Cache
from mopt.device import find_device
from mopt.errors import UsageError
from mopt.lowering import Runner
from mopt.pass_base import Skip
from mopt.program import Program
from mopt.registry import find_backend
from mopt.safe_read import Folder
from mopt.signature import Signature

DEVICES = ("cpu", "interpreter", "cuda")


class _GraphFiles(Protocol):
    """What is used of the backend that writes graphs as data."""

    def unsupported(self, program: Program) -> list[Skip]: ...

    def lower(self, program: Program, folder: Path, signature: Signature) -> list[str]: ...

    def read_module(self, folder: Path) -> fx.GraphModule: ...


def _graph_files() -> _GraphFiles:
    return cast(_GraphFiles, find_backend("eager"))


class TritonBackend:
    """Graph and weights as data, kernels compiled for NVIDIA's or AMD's GPUs."""

    name = "triton"

    def unsupported(self, program: Program) -> list[Skip]:
        """Calls that cannot be written to a graph file; whatever has no kernel PyTorch runs."""
        return _graph_files().unsupported(program)

    def lower(
        self, program: Program, folder: Path, signature: Signature, *, target: str = "host"
    ) -> list[str]:
        """Write the graph, its weights and the kernels for ``target``'s architecture and others.

        Needs no GPU. Raises LoweringError ``no-gpu-target``, ``triton-version``,
        ``kernel-compile``, ``no-legal-tile`` or ``kernel-wrong``.
        """
        # Triton is imported where kernels are, so that the backend can be listed without it.
        from mopt.backends.triton.aot import triton_version
        from mopt.backends.triton.architectures import architecture_of
        from mopt.backends.triton.kernel_file import write_kernels
        from mopt.backends.triton.plan import make_plan
        from mopt.backends.triton.rewrite import find_sites
        from mopt.backends.triton.tuning import timer_here

        triton_version()
        device = find_device(target)
        arch = architecture_of("host" if device.is_host else device.id)
        files = _graph_files().lower(program, folder, signature)
        sites, left = find_sites(program.graph_module)
        # The target is this machine's own GPU: there tiles are timed instead of estimated.
        timer = timer_here if device.is_host else None
        plan = make_plan(sites, left, program.graph, arch, device, Cache(worth_seconds=0), timer)
        return [*files, *write_kernels(plan, folder)]

    def open(
        self, folder: Path, signature: Signature, *, threads: int | None,
        device: str | None = None, trust: bool = False,
    ) -> Runner:  # fmt: skip
        """Load a lowered model.

        ``device`` is "cpu" (the default: every operator's reference), "interpreter" (kernels in
        Triton's interpreter, slowly) or "cuda". There, kernels are compiled from the sources that
        come with mopt unless ``trust`` lets the artifact's own binaries run. Raises UsageError
        ``unknown-device-choice``, LoweringError ``no-gpu`` or ``no-binary-for-gpu``.
        """
        from mopt.backends.triton.runtime import open_runner

        if device not in (None, *DEVICES):
            raise UsageError(
                f"device {device!r} is not one of {', '.join(DEVICES)}",
                code="unknown-device-choice",
            )
        module = _graph_files().read_module(folder)
        with Folder(folder) as opened:
            return open_runner(module, opened, device or "cpu", trust=trust, threads=threads)

    def bench_command(self, folder: Path, inputs: Path, *, threads: int | None) -> list[str]:
        """Time the model in a fresh process, on the GPU where there is one."""
        return [
            sys.executable, "-m", "mopt.backends.triton.bench", str(folder), str(inputs),
            str(threads or 0),
        ]  # fmt: skip

    def describe(self, folder: Path) -> dict[str, Any]:
        """What ``mopt inspect`` shows of an artifact's kernels; nothing of it is run."""
        from mopt.backends.triton.kernel_file import read_kernels

        with Folder(folder) as opened:
            data = dict(read_kernels(opened).data)
        del data["values"]  # for loading, of no use to a reader
        return data


BACKEND = TritonBackend()
