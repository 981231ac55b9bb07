"""Captures a model into CUDA graphs: one launch instead of hundreds for each size of inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Every graph keeps the memory of one run; calls of more sizes than this run without one.
MOST_GRAPHS = 8
# Kernels are compiled, loaded and given their workspaces before anything is captured.
_WARM_UPS = 3

Call = Callable[[list[Tensor]], Sequence[Any]]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Any]


class GraphReplay:
    """Calls ``call`` through a graph for each combination of shapes, captured when it first comes.

    Sizes that depend on values cannot be captured: such a model runs call by call, and
    ``is_captured`` says so.
    """

    def __init__(self, call: Call) -> None:
        self._eager = call
        self._graphs: dict[tuple[Any, ...], _Captured | None] = {}

    @property
    def is_captured(self) -> bool:
        """Whether every size that came so far has a graph."""
        return all(found is not None for found in self._graphs.values())

    def __call__(self, inputs: list[Tensor]) -> list[Any]:
        """The outputs, which are copies: the next call does not change them."""
        key = tuple((tuple(value.shape), value.dtype) for value in inputs)
        if key not in self._graphs:
            if len(self._graphs) >= MOST_GRAPHS:
                return list(self._eager(inputs))
            self._graphs[key] = self._capture(inputs)
        found = self._graphs[key]
        if found is None:
            return list(self._eager(inputs))
        for place, value in zip(found.inputs, inputs, strict=True):
            place.copy_(value)
        found.graph.replay()
        return [v.clone() if isinstance(v, Tensor) else v for v in found.outputs]

    def _capture(self, inputs: list[Tensor]) -> _Captured | None:
        places = [value.clone() for value in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._eager(places)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = list(self._eager(places))
        except RuntimeError:
            torch.cuda.synchronize()
            return None  # the model waits for the GPU somewhere inside
        return _Captured(graph, places, outputs)
