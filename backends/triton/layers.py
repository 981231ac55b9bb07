"""Layers that call kernels: modules that stand in a graph for ``mopt::`` operators.

A layer knows its kernel, what it would take (a problem for every number of rows) and how to run:
the tile comes from a table, the runner from whoever loaded the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from mopt.backends.triton.kernel import Kernel, Problem, problem
from mopt.backends.triton.kernels import linear_bytes, linear_codes, quantize_tensor
from mopt.backends.triton.kernels.linear_codes import PackedWeight
from mopt.backends.triton.launch import Launch, Recorder, Runner, Tile

LINEAR_CODES = Kernel("linear-codes", linear_codes.space, linear_codes.legal, linear_codes.work)


LINEAR_BYTES = Kernel("linear-bytes", linear_bytes.space, linear_bytes.legal, linear_bytes.work)
KERNELS = {kernel.name: kernel for kernel in (LINEAR_CODES, LINEAR_BYTES)}


class TileTable(Protocol):
    """Says which tile a problem takes."""

    def __call__(self, problem: Problem) -> Tile:
        """The tile for a problem, whose ``rows`` are those of the call."""
        ...


class KernelLayer(nn.Module, ABC):
    """A layer of a lowered graph. ``bind`` must come before the first call."""

    kernel: Kernel

    def __init__(self) -> None:
        super().__init__()
        self._run: Runner | None = None
        self._tiles: TileTable | None = None

    def bind(self, run: Runner, tiles: TileTable) -> None:
        """Say who runs launches and which tiles they take."""
        self._run, self._tiles = run, tiles

    @abstractmethod
    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        """What a call with so many rows asks of the kernel."""

    @abstractmethod
    def launches(self, rows: int, dtype: torch.dtype, config: Tile) -> list[Launch]:
        """The launches of such a call, on tensors that hold nothing."""


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
            bias=self.bias is not None, itemsize=dtype.itemsize, rows=rows,
        )  # fmt: skip

    def launches(self, rows: int, dtype: torch.dtype, config: Tile) -> list[Launch]:
        recorder = Recorder()
        meta = torch.device("meta")
        x = torch.empty(rows, self.weight.columns, dtype=dtype, device=meta)
        bias = self.bias.to(meta) if self.bias is not None else None
        counters = self.counters.to(meta)
        linear_codes.call(recorder, config, x, self.weight.to(meta), bias, counters)
        return list(recorder.launches.values())


class DynamicInt8Linear(KernelLayer):
    """A linear layer in 8-bit integers whose input is rounded by the range of the whole call."""

    kernel = LINEAR_BYTES

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.outputs, self.columns = codes.shape
        multiple = linear_bytes.PADDED
        rows, columns = -self.outputs % multiple, -self.columns % multiple
        padded = nn.functional.pad(codes, (0, columns, 0, rows))
        self.register_buffer("codes", padded)
        self.register_buffer("scales", nn.functional.pad(scales.float(), (0, rows)))
        self.register_buffer("sums", padded.sum(1, dtype=torch.int32))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """What ``mopt::linear_dynamic_int8`` computes, over the last axis."""
        assert self._run is not None and self._tiles is not None
        flat = x.reshape(-1, self.columns).contiguous()
        config = self._tiles(self.problem(flat.shape[0], x.dtype))
        return self._computed(self._run, config, flat).reshape(*x.shape[:-1], self.outputs)

    def _computed(self, run: Runner, config: Tile, x: Tensor) -> Tensor:
        codes, scale, zero = quantize_tensor.call(run, x)
        return linear_bytes.call(
            run, config, codes, self.codes, scale, self.scales, self.bias, self.outputs,
            zero=zero, sums=self.sums, dtype=x.dtype,
        )  # fmt: skip

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        return problem(
            self.kernel.name, kind="int8", outputs=self.outputs, columns=self.columns,
            units=-(-self.columns // linear_bytes.PADDED), bias=self.bias is not None,
            itemsize=dtype.itemsize, rows=rows,
        )  # fmt: skip

    def launches(self, rows: int, dtype: torch.dtype, config: Tile) -> list[Launch]:
        recorder = Recorder()
        bias = self.bias.to("meta") if self.bias is not None else None
        layer = DynamicInt8Linear(self.codes[: self.outputs, : self.columns].to("meta"),
                                  self.scales[: self.outputs].to("meta"), bias)  # fmt: skip
        x = torch.empty(rows, self.columns, dtype=dtype, device="meta")
        layer._computed(recorder, config, x)
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
