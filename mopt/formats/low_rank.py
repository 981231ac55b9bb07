"""Weights as products of two thin matrices of floats."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mopt.formats.base import Encoded, Format, record, register_format, require_finite
from mopt.formats.grid import Grid
from mopt.layers import Layer, is_returned
from mopt.low_rank import break_even, decompose, uniform_rank
from mopt.program import Program

_NAME = re.compile(r"low-rank-([1-9]\d?)")
_MULTIPLE = 8


@register_format
@dataclass(frozen=True)
class LowRank(Format):
    """``low-rank-50``: two thin linear layers that hold 50 % of the numbers of one.

    By itself the format takes the nearest matrix of its rank; factors that are nearest in what the
    layer gives for real inputs are an algorithm's (``mopt.low_rank``). Heads of a model stay whole:
    nothing smooths their errors.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    operator: ClassVar[str] = "aten::linear"

    percent: int = 50

    @property
    def name(self) -> str:
        return f"low-rank-{self.percent}"

    @property
    def bits(self) -> int:
        return 32

    @property
    def kernels(self) -> frozenset[tuple[str, str]]:
        return frozenset({("onnx", "cpu")})

    @classmethod
    def parse(cls, name: str) -> LowRank | None:
        found = _NAME.fullmatch(name)
        return cls(int(found.group(1))) if found else None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("low-rank-75", "low-rank-50", "low-rank-25")

    def rank(self, shape: tuple[int, ...]) -> int:
        """Of a weight of that shape; a multiple of 8."""
        return uniform_rank(shape, 1 - self.percent / 100, _MULTIPLE)

    def check(self, layer: Layer, weight: Tensor) -> str | None:
        reason = super().check(layer, weight)
        if reason is None and self.rank(layer.shape) > break_even(layer.shape):
            return f"a rank of {_MULTIPLE} holds no fewer numbers than the matrix"
        if reason is None and any(is_returned(call) for call in layer.calls):
            return "it is the model's head, whose errors nothing smooths"
        return reason

    def encode(self, weight: Tensor, *, grid: Grid | None = None) -> Encoded:
        require_finite(weight)
        first, second = decompose(weight).factors(self.rank(tuple(weight.shape)))
        tensors = {"first": first.to(weight.dtype), "second": second.to(weight.dtype)}
        return Encoded(self.name, tuple(weight.shape), tensors)

    def decode(self, encoded: Encoded) -> Tensor:
        return encoded.tensors["second"] @ encoded.tensors["first"]

    def size_bytes(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        return self.rank(shape) * sum(shape) * dtype.itemsize

    def place(self, program: Program, layer: Layer, encoded: Encoded) -> None:
        place_factors(program, layer, encoded.tensors["first"], encoded.tensors["second"])
        record(program, layer, self.name)


def place_factors(program: Program, layer: Layer, first: Tensor, second: Tensor) -> None:
    """Let a layer's calls compute ``second (first x) + bias``; they keep their names."""
    dtype = program.weight(layer.weight).dtype
    name = str(layer.weight.target)
    inner = outer = None
    for call in layer.calls:
        if inner is None or outer is None:
            inner = program.add_weight(f"{name}_first", first.to(dtype).contiguous(), call)
            outer = program.add_weight(f"{name}_second", second.to(dtype).contiguous(), call)
        thin = program.insert_call(torch.ops.aten.linear.default, (call.args[0], inner), like=call)
        call.args = (thin, outer, *call.args[2:])
    for node in program.nodes:
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
