"""Layers that call kernels: modules that stand in a graph for the operators they compute.

A layer knows its kernel, what it would take (a problem for every number of rows) and how to run:
the tile comes from a table, the runner from whoever loaded the model.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from mopt.backends.triton.kernel import Kernel, Problem
from mopt.backends.triton.launch import Launch, Recorder, Runner, Tile

# Rows for which a tile is chosen; a call takes the next larger one's, beyond the last the last's.
BUCKETS = (1, 16, 32, 64, 256, 2048)
# Facts that change from call to call, or follow from others: a table has tiles for all of them.
_FREE = frozenset({"rows", "keys", "batch", "units"})


class TileTable(Protocol):
    """Says which tile a problem takes."""

    def __call__(self, problem: Problem) -> Tile:
        """The tile for a problem, whose ``rows`` are those of the call."""
        ...


class KernelLayer(nn.Module, ABC):
    """A layer of a lowered graph. ``bind`` must come before the first call.

    ``buckets`` are the numbers of rows tiles are chosen for.
    """

    kernel: ClassVar[Kernel]
    buckets: ClassVar[tuple[int, ...]] = BUCKETS

    def __init__(self) -> None:
        super().__init__()
        self._run: Runner | None = None
        self._tiles: TileTable | None = None
        self._always = False

    def bind(self, run: Runner, tiles: TileTable, *, always: bool = False) -> None:
        """Say who runs launches and which tiles they take; ``always`` by the kernel."""
        self._run, self._tiles, self._always = run, tiles, always

    def forward(self, *inputs: Tensor) -> Any:
        """What the operators compute."""
        assert self._run is not None and self._tiles is not None, "the layer is not bound"
        rows, dtype = self.rows_of(*inputs)
        return self.compute(self._run, self._tiles(self.problem(rows, dtype)), *inputs)

    @abstractmethod
    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        """The rows of a call and the type it computes in."""

    @abstractmethod
    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        """What a call with so many rows asks of the kernel."""

    @abstractmethod
    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Any:
        """The outputs by the kernel."""

    @abstractmethod
    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Inputs of such a call on the ``meta`` device."""

    def on_meta(self) -> Self:
        """The same layer with weights that hold nothing."""
        twin = copy.copy(self)
        twin.__dict__ = dict(self.__dict__)
        twin._buffers = {
            name: value if value is None else value.to("meta")
            for name, value in self._buffers.items()
        }
        return twin

    def launches(self, rows: int, dtype: torch.dtype, config: Tile) -> list[Launch]:
        """The launches of such a call, on tensors that hold nothing."""
        recorder = Recorder()
        self.on_meta().compute(recorder, config, *self.example(rows, dtype))
        return list(recorder.launches.values())


class ManyRowsLayer(KernelLayer, ABC):
    """A layer whose kernel would leave most of a chip idle for fewer than ``least_rows`` rows."""

    least_rows: ClassVar[int]

    def forward(self, *inputs: Tensor) -> Any:
        """What the operators compute, of few rows by PyTorch's operators."""
        if self.rows_of(*inputs)[0] < self.least_rows and not self._always:
            return self.without_kernel(*inputs)
        return super().forward(*inputs)

    @abstractmethod
    def without_kernel(self, *inputs: Tensor) -> Any:
        """The same by PyTorch's operators."""


def table_key(found: Problem) -> str:
    """A problem without what changes from call to call: what an artifact's tables have as keys."""
    return Problem(found.kernel, tuple(f for f in found.facts if f[0] not in _FREE)).text


class StoredTiles:
    """Tiles by problem and bucket of rows, as an artifact has them for one architecture."""

    def __init__(self, tables: Mapping[str, Mapping[int, Tile]]) -> None:
        self._tables = {key: sorted(found.items()) for key, found in tables.items()}

    def __call__(self, problem: Problem) -> Tile:
        """The tile of the next larger bucket; the last one's for more rows than all of them."""
        rows = problem["rows"]
        table = self._tables[table_key(problem)]
        return next((config for limit, config in table if rows <= limit), table[-1][1])
