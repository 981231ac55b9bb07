"""Times tiles of a layer on the GPU at hand, for its own weights."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mopt.backends.triton.architectures import Architecture
from mopt.backends.triton.jit import JitRunner
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import KernelLayer

# How many times a tile is run, after as many calls again that compile and warm up as it takes.
_RUNS, _WARM_UPS = 11, 2
# What is written between runs, so that weights do not wait in the cache: more than any chip has.
_FLUSH_BYTES = 256 << 20

Clock = Callable[[Callable[[], Any]], float]


class LayerTimer:
    """Seconds that a call of a layer takes with a tile.

    ``clock`` times one function; ``run`` runs its launches on ``device``.
    """

    def __init__(
        self, layer: KernelLayer, dtype: torch.dtype, run: Runner, device: str, clock: Clock
    ) -> None:
        self._layer = copy.deepcopy(layer).to(device)
        self._dtype, self._run, self._device, self._clock = dtype, run, device, clock

    def __call__(self, rows: int, config: Tile) -> float:
        """The median time of calls with so many rows."""
        inputs = [_filled(x, self._device) for x in self._layer.example(rows, self._dtype)]
        self._layer.bind(self._run, lambda problem: config, always=True)
        with torch.no_grad():
            return self._clock(lambda: self._layer(*inputs))


def _filled(empty: Tensor, device: str) -> Tensor:
    """Random values in the layout of a tensor that holds none."""
    made = torch.empty_strided(empty.shape, empty.stride(), dtype=empty.dtype, device=device)
    return made.normal_() if empty.dtype.is_floating_point else made.random_(0, 100)


def cuda_clock(call: Callable[[], Any]) -> float:
    """The median of runs by CUDA events, each on a cold cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(_WARM_UPS):
        call()
    samples = []
    for _ in range(_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def timer_here(layer: KernelLayer, dtype: torch.dtype, arch: Architecture) -> LayerTimer:
    """The timer of this machine's GPU."""
    return LayerTimer(layer, dtype, JitRunner(arch), "cuda", cuda_clock)
