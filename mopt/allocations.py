"""What PyTorch's CPU allocator hands out while code runs: the peak, and the peak of each part.

Memory that libraries take by themselves (thread stacks, BLAS buffers) is not seen here; the
resident size of a fresh process is, in ``mopt.measure``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch._C._profiler import _ExperimentalConfig

_PREFIX = "mopt:"


@dataclass(frozen=True)
class Usage:
    """Bytes above what was held at the start: the most, and what was still held at the end."""

    peak: int
    kept: int


@dataclass
class Allocations:
    """Filled when the block of :func:`record_allocations` ends: all of it, and its sections."""

    total: Usage = Usage(0, 0)
    sections: dict[str, Usage] = field(default_factory=dict)

    @staticmethod
    def section(name: str) -> torch.autograd.profiler.record_function:
        """A context whose usage is listed under ``name``, which must be new."""
        return torch.autograd.profiler.record_function(_PREFIX + name)


@contextmanager
def record_allocations() -> Iterator[Allocations]:
    """Watch the allocations of this thread's operators; what ends with the block is not counted.

    The operators' records come in order, so peaks are exact and do not depend on clocks. Cannot be
    nested, nor used while another profiler runs.
    """
    config = torch.autograd.ProfilerConfig(
        torch.autograd.ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()
    )
    found = Allocations()
    torch.autograd._enable_profiler_legacy(config)
    try:
        yield found
    finally:
        threads = torch.autograd._disable_profiler_legacy()
        _fill(found, threads)


def _fill(found: Allocations, threads: list[list[torch.autograd.ProfilerEvent]]) -> None:
    held = peak = 0
    for events in threads:
        # Names of what is open, and for sections where they began and their peak so far.
        stack: list[tuple[str, int, int]] = []
        for event in events:
            kind = event.kind()
            if kind == "push":
                stack.append((event.name(), held, held))
            elif kind == "pop" and stack:
                name, start, most = stack.pop()
                if stack and stack[-1][2] < most:
                    stack[-1] = (*stack[-1][:2], most)
                if name.startswith(_PREFIX):
                    found.sections[name.removeprefix(_PREFIX)] = Usage(most - start, held - start)
            elif kind == "memory_alloc":
                held += event.cpu_memory_usage()
                peak = max(peak, held)
                if stack and stack[-1][2] < held:
                    stack[-1] = (*stack[-1][:2], held)
    found.total = Usage(peak, held)
