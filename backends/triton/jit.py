"""Runs launches on the GPU through Triton's own compiler and cache."""

from __future__ import annotations

from mopt.backends.triton.architectures import Architecture
from mopt.backends.triton.launch import Launch


class JitRunner:
    """Compiles a launch the first time it comes, from the source that is installed."""

    def __init__(self, arch: Architecture) -> None:
        self._arch = arch

    def __call__(self, launch: Launch) -> None:
        """Run a launch on the current stream."""
        launch.function[launch.grid](
            **launch.arguments, **launch.constants, ARCH=self._arch.number,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
