"""Layers that call kernels: modules that stand in a graph for ``mopt::`` operators.

A layer knows its kernel, what it would take (a problem for every number of rows) and how to run:
the tile comes from a table, the runner from whoever loaded the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mopt.backends.triton.kernel import Kernel, Problem, problem
from mopt.backends.triton.kernels import linear_codes
from mopt.backends.triton.kernels.linear_codes import PackedWeight
from mopt.backends.triton.launch import Launch, Recorder, Runner, Tile

LINEAR_CODES = Kernel("linear-codes", linear_codes.space, linear_codes.legal, linear_codes.work)


class TileTable(Protocol):
    """Says which tile a problem takes."""

    def __call__(self, problem: Problem) -> Tile:
        """The tile for a problem, whose ``rows`` are those of the call."""
        ...


class KernelLayer(nn.Module):
    """A layer of a lowered graph. ``bind`` must come before the first call."""

    kernel: Kernel

    def __init__(self) -> None:
        super().__init__()
        self._run: Runner | None = None
        self._tiles: TileTable | None = None

    def bind(self, run: Runner, tiles: TileTable) -> None:
        """Say who runs launches and which tiles they take."""
        self._run, self._tiles = run, tiles

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        """What a call with so many rows asks of the kernel."""
        raise NotImplementedError

    def launches(self, rows: int, dtype: torch.dtype, config: Tile) -> list[Launch]:
        """The launches of such a call, on tensors that hold nothing."""
        raise NotImplementedError


class CodesLinear(KernelLayer):
    """A linear layer whose weight is codes."""

    kernel = LINEAR_CODES

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias)
        count = linear_codes.counters_needed(weight)
        device = weight.codes.device
        self.register_buffer("counters", torch.zeros(count, dtype=torch.int32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.weight = PackedWeight(
            **{k: fn(v) if isinstance(v, Tensor) else v for k, v in vars(self.weight).items()}
        )
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias`` over the last axis."""
        assert self._run is not None and self._tiles is not None
        flat = x.reshape(-1, self.weight.columns)
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        config = self._tiles(self.problem(flat.shape[0], x.dtype))
        out = linear_codes.call(self._run, config, flat, self.weight, self.bias, self.counters)
        return out.reshape(*x.shape[:-1], self.weight.outputs)

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        weight = self.weight
        return problem(
            self.kernel.name, kind=weight.kind, outputs=weight.outputs, columns=weight.columns,
            group=weight.group, units=weight.units, zeros=weight.zeros is not None,
            itemsize=dtype.itemsize, rows=rows,
        )  # fmt: skip

    def launches(self, rows: int, dtype: torch.dtype, config: Tile) -> list[Launch]:
        recorder = Recorder()
        meta = torch.device("meta")
        x = torch.empty(rows, self.weight.columns, dtype=dtype, device=meta)
        bias = self.bias.to(meta) if self.bias is not None else None
        counters = self.counters.to(meta)
        linear_codes.call(recorder, config, x, self.weight.to(meta), bias, counters)
        return list(recorder.launches.values())


def table_key(found: Problem) -> str:
    """A problem without its rows: what the tables of an artifact are keyed by."""
    return Problem(found.kernel, tuple(f for f in found.facts if f[0] != "rows")).text


class StoredTiles:
    """Tiles by problem and bucket of rows, as an artifact has them for one architecture."""

    def __init__(self, tables: Mapping[str, Mapping[int, Tile]]) -> None:
        self._tables = {key: sorted(found.items()) for key, found in tables.items()}

    def __call__(self, found: Problem) -> Tile:
        """The tile of the next larger bucket; the last one's for more rows than all of them."""
        rows = found["rows"]
        table = self._tables[table_key(found)]
        return next((config for limit, config in table if rows <= limit), table[-1][1])


def kernel_layers(module: nn.Module) -> dict[str, KernelLayer]:
    """The kernel layers of a lowered graph by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, KernelLayer)}


def unbound(found: Any) -> bool:
    """Whether a layer has no runner yet."""
    return isinstance(found, KernelLayer) and found._run is None


KERNELS = {kernel.name: kernel for kernel in (LINEAR_CODES,)}
