"""Symmetric 8-bit codes with one scale per output channel or table row."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mopt.formats.base import (
    Encoded,
    GridFormat,
    argument,
    drop_reader,
    groups_of,
    record,
    register_format,
    require_finite,
    row_pieces,
    store,
    swap_calls,
)
from mopt.formats.grid import SCALE_FLOOR, Grid, round_, search_grid, values_at_a_time
from mopt.layers import Layer
from mopt.program import Program

ROW_GROUPS = (16, 32, 64, 128)
_ROW_GROUP = re.compile(r"int8-row-g(\d+)")


@dataclass(frozen=True)
class _Int8Rows(GridFormat):
    """Codes int8 in the weight's own shape, scales float32, one per index of axis 0."""

    limit: ClassVar[int] = 127

    @property
    def bits(self) -> int:
        return 8

    def group_of(self, columns: int) -> int:
        return columns

    def grid(
        self, weight: Tensor, *, ranges: str = "mse", importance: Tensor | None = None
    ) -> Grid:
        require_finite(weight)
        flat = weight.reshape(len(weight), -1)
        group = self.group_of(flat.shape[1])
        found = search_grid(flat, group, 8, symmetric=True, ranges=ranges, importance=importance)
        # The search ends at 127 steps; a narrower code range needs wider steps.
        scales = found.scales * (127 / self.limit)
        return Grid(scales.clamp(min=SCALE_FLOOR).float())

    def encode(self, weight: Tensor, *, grid: Grid | None = None) -> Encoded:
        require_finite(weight)
        grid = self.grid(weight) if grid is None else grid
        flat = weight.reshape(len(weight), -1).float()
        group = self.group_of(flat.shape[1])
        codes = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)
        for at in row_pieces(flat, values_at_a_time()):
            steps = grid.scales[at].float().repeat_interleave(group, dim=1)[:, : flat.shape[1]]
            codes[at] = round_(flat[at] / steps).clamp(-self.limit, self.limit).to(torch.int8)
        tensors = {"codes": codes.view(weight.shape), "scales": self._stored(grid.scales)}
        return Encoded(self.name, tuple(weight.shape), tensors)

    def decode(self, encoded: Encoded) -> Tensor:
        codes = encoded.tensors["codes"]
        flat = codes.reshape(len(codes), -1)
        scales = encoded.tensors["scales"].reshape(len(codes), -1)
        group = self.group_of(flat.shape[1])
        weight = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
        for at in row_pieces(flat):
            steps = scales[at].repeat_interleave(group, dim=1)[:, : flat.shape[1]]
            weight[at] = flat[at].float() * steps
        return weight.view(encoded.shape)

    def quantize_columns(self, columns: Tensor, grid: Grid, group: int, start: int) -> Tensor:
        at = groups_of(start, columns.shape[1], group)
        steps = grid.scales.float()[:, at]
        return torch.round(columns.float() / steps).clamp(-self.limit, self.limit) * steps

    def size_bytes(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        rows, columns = shape[0], 1
        for size in shape[1:]:
            columns *= size
        return rows * columns + 4 * rows * -(-columns // self.group_of(columns))

    def check(self, layer: Layer, weight: Tensor) -> str | None:
        reason = super().check(layer, weight)
        if reason is None and weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            return f"the weight is {kind}, {self.name} computes in float32: call model.float()"
        return reason

    @abstractmethod
    def _stored(self, scales: Tensor) -> Tensor:
        """The scales in the shape the operator reads."""


@register_format
@dataclass(frozen=True)
class Int8Dynamic(_Int8Rows):
    """``int8-dynamic``: int8 weights per output channel, activations quantized at run time.

    ``reduced`` (``int8-dynamic-reduced``) keeps codes within [-64, 64]: on x86 processors without
    VNNI, pairs of larger products overflow the 16 bits they are added in.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    operator: ClassVar[str] = "mopt::linear_dynamic_int8"

    reduced: bool = False

    @property
    def limit(self) -> int:  # type: ignore[override]
        return 64 if self.reduced else 127

    @property
    def name(self) -> str:
        return "int8-dynamic-reduced" if self.reduced else "int8-dynamic"

    @property
    def kernels(self) -> frozenset[tuple[str, str]]:
        return frozenset({("onnx", "cpu")})

    @classmethod
    def parse(cls, name: str) -> Int8Dynamic | None:
        return {"int8-dynamic": cls(), "int8-dynamic-reduced": cls(reduced=True)}.get(name)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("int8-dynamic", "int8-dynamic-reduced")

    def place(self, program: Program, layer: Layer, encoded: Encoded) -> None:
        nodes = store(program, layer, encoded)

        def arguments(call: Any) -> tuple[Any, ...]:
            return call.args[0], nodes["codes"], nodes["scales"], argument(call, 2, "bias")

        swap_calls(program, layer, torch.ops.mopt.linear_dynamic_int8.default, arguments)
        record(program, layer, self.name)

    def _stored(self, scales: Tensor) -> Tensor:
        return scales.float().reshape(-1)


@register_format
@dataclass(frozen=True)
class Int8Row(_Int8Rows):
    """``int8-row`` or ``int8-row-g32``: an embedding table in int8, a scale per row or block of it.

    Per row, the codes are those of :class:`Int8Dynamic`, so that a table and a head that share
    their weight can share them.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"embedding"})
    operator: ClassVar[str] = "mopt::embedding_int8"

    group: int = 0

    @property
    def name(self) -> str:
        return f"int8-row-g{self.group}" if self.group else "int8-row"

    @property
    def kernels(self) -> frozenset[tuple[str, str]]:
        return frozenset({("onnx", "cpu")})

    @classmethod
    def parse(cls, name: str) -> Int8Row | None:
        if name == "int8-row":
            return cls()
        found = _ROW_GROUP.fullmatch(name)
        return cls(int(found.group(1))) if found and int(found.group(1)) in ROW_GROUPS else None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("int8-row", *(f"int8-row-g{group}" for group in ROW_GROUPS))

    def group_of(self, columns: int) -> int:
        return self.group or columns

    def check(self, layer: Layer, weight: Tensor) -> str | None:
        reason = super().check(layer, weight)
        if reason is None and self.group and weight.shape[1] % self.group:
            return (
                f"rows of {weight.shape[1]} values are not a multiple of group {self.group}; "
                "use group=0, one scale per row"
            )
        return reason

    def place(self, program: Program, layer: Layer, encoded: Encoded) -> None:
        nodes = store(program, layer, encoded)

        def arguments(call: Any) -> tuple[Any, ...]:
            return call.args[1], nodes["codes"], nodes["scales"]

        swap_calls(program, layer, torch.ops.mopt.embedding_int8.default, arguments)
        record(program, layer, self.name)

    def _stored(self, scales: Tensor) -> Tensor:
        return scales.float()


@register_format
@dataclass(frozen=True)
class Int8Qdq(_Int8Rows):
    """``int8-qdq``: int8 per output channel behind a dequantize, for integer kernels.

    Between a dequantized input and a quantized output, runtimes compute the layer in integers. By
    itself the format only stores the weight in a quarter of the bytes. ``reduced`` is as in
    :class:`Int8Dynamic`.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    operator: ClassVar[str] = "mopt::dequantize"

    reduced: bool = False

    @property
    def limit(self) -> int:  # type: ignore[override]
        return 64 if self.reduced else 127

    @property
    def name(self) -> str:
        return "int8-qdq-reduced" if self.reduced else "int8-qdq"

    @property
    def kernels(self) -> frozenset[tuple[str, str]]:
        return frozenset({("onnx", "cpu")})

    @classmethod
    def parse(cls, name: str) -> Int8Qdq | None:
        return {"int8-qdq": cls(), "int8-qdq-reduced": cls(reduced=True)}.get(name)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("int8-qdq", "int8-qdq-reduced")

    def check(self, layer: Layer, weight: Tensor) -> str | None:
        if any("conv_transpose" in str(call.target) for call in layer.calls):
            return "transposed convolutions have no int8 kernel"
        return super().check(layer, weight)

    def grid(
        self, weight: Tensor, *, ranges: str = "mse", importance: Tensor | None = None
    ) -> Grid:
        found = super().grid(weight, ranges=ranges, importance=importance)
        # The int32 bias is rounded to multiples of input scale times weight scale, so a channel
        # without weights must not get the usual scale of 1.
        empty = (weight.reshape(len(weight), -1) == 0).all(1, keepdim=True)
        if bool(empty.any()) and not bool(empty.all()):
            smallest = found.scales[~empty].min()
            return Grid(torch.where(empty, smallest, found.scales))
        return found

    def encode(self, weight: Tensor, *, grid: Grid | None = None) -> Encoded:
        encoded = super().encode(weight, grid=grid)
        zeros = torch.zeros(len(weight), dtype=torch.int8, device=weight.device)
        return Encoded(self.name, encoded.shape, {**encoded.tensors, "zero_points": zeros})

    def size_bytes(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        return super().size_bytes(shape, dtype) + shape[0]

    def place(self, program: Program, layer: Layer, encoded: Encoded) -> None:
        nodes = store(program, layer, encoded)
        reader = torch.ops.mopt.dequantize.default
        for call in layer.calls:
            old = call.args[1]
            tensors = (nodes["codes"], nodes["scales"], nodes["zero_points"], 0)
            call.replace_input_with(old, program.insert_call(reader, tensors, like=call))
            drop_reader(program, old)
        record(program, layer, self.name)

    def _stored(self, scales: Tensor) -> Tensor:
        return scales.float().reshape(-1)


@register_format
@dataclass(frozen=True)
class Int8Stored(_Int8Rows):
    """``int8-stored``: int8 per output channel, widened to float where the weight is used.

    A quarter of the bytes in the file; what is computed is a float layer. (Along axis 0: of a
    transposed convolution, that are its inputs.)
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    operator: ClassVar[str] = "mopt::widen_int8"

    @property
    def name(self) -> str:
        return "int8-stored"

    @property
    def kernels(self) -> frozenset[tuple[str, str]]:
        return frozenset({("onnx", "cpu")})

    @classmethod
    def parse(cls, name: str) -> Int8Stored | None:
        return cls() if name == "int8-stored" else None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("int8-stored",)

    def place(self, program: Program, layer: Layer, encoded: Encoded) -> None:
        nodes = store(program, layer, encoded)
        for call in layer.calls:
            old = call.args[1]
            tensors = (nodes["codes"], nodes["scales"])
            wide = program.insert_call(torch.ops.mopt.widen_int8.default, tensors, like=call)
            call.replace_input_with(old, wide)
            drop_reader(program, old)
        record(program, layer, self.name)

    def _stored(self, scales: Tensor) -> Tensor:
        return scales.float().reshape(-1)
