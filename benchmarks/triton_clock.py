"""The clock of ``benchmarks/triton_gpu.py``: a card's limits, medians of graph replays, the table.

Importing this module makes mopt's packages importable from the checkout, installed or not.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class _Checkout(importlib.abc.MetaPathFinder):
    """Finds mopt's packages in this checkout where mopt is not installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        folder = {"mopt": ROOT / "mopt", "mopt.backends": ROOT / "backends"}.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


sys.meta_path.insert(0, _Checkout())

import torch  # noqa: E402 - after the packages can be found

from mopt.backends.triton.architectures import running_architecture  # noqa: E402
from mopt.backends.triton.interpreter import run_interpreted  # noqa: E402
from mopt.backends.triton.jit import JitRunner  # noqa: E402
from mopt.backends.triton.kernel import Kernel, Problem  # noqa: E402
from mopt.backends.triton.launch import Runner, Tile  # noqa: E402
from mopt.backends.triton.tiles import Chip, ranked  # noqa: E402

# Tiles that are measured for each problem, the first by estimate that run, and that are tried.
CANDIDATES, ATTEMPTS = 5, 12


class Bench:
    """The card's limits, the clock, and the rows that were printed."""

    def __init__(self, minutes: float) -> None:
        self.ends = time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = []
        self._prepare()

    def _prepare(self) -> None:
        found = running_architecture(*torch.cuda.get_device_capability())
        if found is None:
            sys.exit("no kernel is made for this GPU's compute capability")
        self.device = "cuda"
        self.run: Runner = JitRunner(found)
        properties = torch.cuda.get_device_properties(0)
        self.cache = getattr(properties, "L2_cache_size", 50 << 20)
        self.units = properties.multi_processor_count
        self.copy = self._copy_bandwidth()
        self.rate = self._product_rate()
        self.chip = Chip(self.units, self.copy, self.rate, self.units * 128 * 1.7e9, 3e-6)

    def _copy_bandwidth(self) -> float:
        a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        return 2 * a.numel() / self.seconds([lambda: b.copy_(a)])

    def _product_rate(self) -> float:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return 2 * 8192**3 / self.seconds([lambda: torch.matmul(a, b)])

    def size(self, full: int, small: int) -> int:
        """A size: ``full`` on a GPU, at most ``small`` where nothing is timed."""
        return full

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal values in bf16."""
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A peer by torch.compile."""
        made: Callable[..., Any] = torch.compile(function)
        return made

    def peak(self, call: Callable[[], Any]) -> float:
        """Bytes a call takes beyond what was there."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before
        del kept
        return float(taken)

    def fitting(self, kernel: Kernel, facts: Problem) -> list[Tile]:
        """The first tiles by estimate; some may take more of the chip than it has."""
        return ranked(facts, kernel, self.chip)[:ATTEMPTS]

    def seconds(self, calls: Sequence[Callable[[], Any]], graph: bool = True) -> float:
        """The median time of one call; ``calls`` do the same on different memory, in turn."""
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        repeats = max(1, 8 // len(calls))

        def all_calls() -> None:
            for _ in range(repeats):
                for call in calls:
                    call()

        replay = all_calls
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                all_calls()
            replay = captured.replay
        samples = []
        for _ in range(9):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3 / (repeats * len(calls)))
        return statistics.median(samples[2:])

    def tuned(
        self, kernel: Kernel, facts: Problem, calls: Callable[[Tile], Sequence[Callable[[], Any]]]
    ) -> tuple[float, str]:
        """The best time over the first tiles by estimate, and that tile."""
        best, name, measured = float("inf"), "none", 0
        failure: Exception | None = None
        for config in self.fitting(kernel, facts):
            try:
                taken = self.seconds(calls(config))
            except Exception as error:  # a tile that does not fit is only not the best
                print(f"tile {config}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                failure = error
                continue
            if taken < best:
                best, name = taken, str(config)
            measured += 1
            if measured == CANDIDATES:
                break
        if failure is not None and name == "none":
            raise failure
        return best, name

    def row(self, name: str, seconds: float, *, bytes: float = 0.0, flops: float = 0.0,
            peer: float | None = None, against: str = "", note: str = "", memory: float = 0.0,
            dense_memory: float = 0.0, least_ratio: float = math.nan, least_copy: float = math.nan,
            least_tflops: float = math.nan, most_memory: float = math.nan,
            either: bool = False) -> None:  # fmt: skip
        """Print and keep one result.

        ``least_...`` and ``most_memory`` are what is asked of it, NaN for nothing; with ``either``
        one of them is enough.
        """
        data: dict[str, Any] = {
            "name": name, "us": seconds * 1e6, "note": note,
            "share_of_copy": bytes / seconds / self.copy if bytes else None,
            "tflops": flops / seconds / 1e12 if flops else None,
            "share_of_matmul": flops / seconds / self.rate if flops else None,
            "peer": against, "times_as_fast": peer / seconds if peer else None,
            "memory_share": memory / dense_memory if dense_memory else None,
        }  # fmt: skip
        asked = {"times_as_fast": least_ratio, "share_of_copy": least_copy, "tflops": least_tflops}
        met = [data[key] >= least for key, least in asked.items()
               if not math.isnan(least) and data[key] is not None]  # fmt: skip
        if not math.isnan(most_memory) and data["memory_share"] is not None:
            met.append(data["memory_share"] <= most_memory)
        wanted = {**asked, "memory_share": most_memory}
        data["asked"] = {key: value for key, value in wanted.items() if not math.isnan(value)}
        data["met"] = None if not met else any(met) if either else all(met)
        self.rows.append(data)
        parts = [f"{name:46} {data['us']:9.1f} us"]
        if bytes:
            parts.append(f"{100 * data['share_of_copy']:5.1f} % of copy")
        if flops:
            parts.append(f"{data['tflops']:7.1f} TFLOP/s")
        if peer:
            parts.append(f"{data['times_as_fast']:5.2f} x {against}")
        if dense_memory:
            parts.append(f"{100 * data['memory_share']:5.2f} % of its memory")
        if met:
            parts.append("as asked" if data["met"] else "LESS THAN ASKED")
        print("  ".join([*parts, note]), flush=True)

    def summary(self) -> str:
        """How many of the results that something was asked of have it."""
        asked = [row for row in self.rows if row["met"] is not None]
        less = [row["name"] for row in asked if not row["met"]]
        return f"{len(asked) - len(less)} of {len(asked)} as asked; less: {', '.join(less) or '-'}"

    def is_over(self) -> bool:
        """Whether the minutes are used up."""
        return time.monotonic() > self.ends


class DryBench(Bench):
    """Runs every call once in the interpreter: the sections are tried, nothing is timed."""

    def _prepare(self) -> None:
        self.device, self.run = "cpu", run_interpreted
        torch.manual_seed(0)
        self.cache, self.units, self.copy, self.rate = 0, 132, 4e12, 8e14
        self.chip = Chip(self.units, self.copy, self.rate, self.units * 128 * 1.7e9, 3e-6)

    def size(self, full: int, small: int) -> int:
        return min(full, small)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def peak(self, call: Callable[[], Any]) -> float:
        call()
        return 1.0

    def fitting(self, kernel: Kernel, facts: Problem) -> list[Tile]:
        return super().fitting(kernel, facts)[:1]

    def seconds(self, calls: Sequence[Callable[[], Any]], graph: bool = True) -> float:
        for call in calls[:1]:
            call()
        return 1e-3
