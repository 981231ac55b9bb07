"""Weights stored in 16 bits and computed with in 32: smaller files, the same arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mopt.formats.base import (
    Encoded,
    Format,
    drop_reader,
    record,
    register_format,
    require_finite,
    store,
)
from mopt.formats.grid import Grid
from mopt.layers import EMBEDDING, Layer
from mopt.program import Program

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Rounding to bfloat16 costs at most 4e-6 of a weight's square sum, so a format that costs more
# than this is losing values to its range, not to its precision.
_LARGEST_ERROR = 1e-5


@register_format
@dataclass(frozen=True)
class Half(Format):
    """``fp16`` or ``bf16``: the weight cast to 16 bits, widened where it is used.

    The tables of embeddings are widened after the look-up, so only the rows in use are.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution", "embedding"})
    operator: ClassVar[str] = "mopt::widen"

    storage: str = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is stored."""
        return _DTYPES[self.storage]

    @property
    def name(self) -> str:
        return self.storage

    @property
    def bits(self) -> int:
        return 16

    @classmethod
    def parse(cls, name: str) -> Half | None:
        return cls(name) if name in _DTYPES else None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(_DTYPES)

    def check(self, layer: Layer, weight: Tensor) -> str | None:
        return super().check(layer, weight) or self.range_reason(weight)

    def range_reason(self, weight: Tensor) -> str | None:
        """Why the range of 16 bits does not hold a weight, or None."""
        if weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            return f"the weight is {kind}, only float32 becomes smaller in 16 bits"
        stored = weight.to(self.dtype)
        if not bool(torch.isfinite(stored).all()):
            limit = torch.finfo(self.dtype).max
            return f"its largest value {float(weight.abs().max()):.3g} exceeds {limit:.5g}"
        reference = weight.double()
        wrong = float((stored.double() - reference).square().sum())
        if wrong > _LARGEST_ERROR * float(reference.square().sum()):
            return f"its values are too small for {self.name}, which would round them to zero"
        return None

    def encode(self, weight: Tensor, *, grid: Grid | None = None) -> Encoded:
        require_finite(weight)
        return Encoded(self.name, tuple(weight.shape), {self.name: weight.to(self.dtype)})

    def decode(self, encoded: Encoded) -> Tensor:
        return encoded.tensors[self.name].float()

    def size_bytes(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        return 2 * torch.Size(shape).numel()

    def place(self, program: Program, layer: Layer, encoded: Encoded) -> None:
        stored = store(program, layer, encoded)[self.name]
        readers = {a for call in layer.calls for a in call.all_input_nodes
                   if a.op == "get_attr" and a.target == layer.weight.target}  # fmt: skip
        for call in layer.calls:
            for reader in readers & set(call.all_input_nodes):
                widen_argument(program, call, reader, stored)
        for reader in readers:
            drop_reader(program, reader)
        record(program, layer, self.name)


def widen_argument(program: Program, call: fx.Node, reader: fx.Node, stored: fx.Node) -> None:
    """Let ``call`` read ``stored`` in the dtype of ``reader``, which it read before."""
    widen = torch.ops.mopt.widen.default
    dtype = program.weight(reader).dtype
    if call.target in EMBEDDING and call.args[0] is reader:
        with program.graph.inserting_after(call):
            wide = program.graph.call_function(widen, (call, dtype))
        wide.meta.update(call.meta)
        call.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
        call.replace_input_with(reader, stored)
        return
    call.replace_input_with(reader, program.insert_call(widen, (stored, dtype), like=call))
