"""Rotary embedding as Llama-shaped models write it, with stored angles.

``x * cos + cat(-x2, x1) * sin`` for the halves ``x1, x2`` of ``x`` (batch, heads, tokens, width).
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from mopt.backends.triton.kernel import Amount, Kernel, Problem, only_tile, problem
from mopt.backends.triton.kernels import rotary
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import KernelLayer
from mopt.backends.triton.match import (
    FLOATS,
    calls,
    constant,
    is_call,
)
from mopt.backends.triton.rewrite import Left, Lowering, Site
from mopt.backends.triton.values import Value, value_of
from mopt.effects import argument

_aten = torch.ops.aten


def _work(found: Problem) -> Amount:
    count = float(found["rows"] * found["outputs"])
    return Amount(6 * count, 0.0, 2 * count * found["itemsize"])


ROTARY = Kernel("rotary", only_tile, lambda config, found: None, _work)


class Rotary(KernelLayer):
    """Queries or keys rotated by the angles of their positions."""

    kernel = ROTARY
    buckets = (2048,)

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].shape[0] * inputs[0].shape[2], inputs[0].dtype

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Tensor:
        """``x`` (batch, heads, tokens, width) by ``cos`` and ``sin`` (tokens, width)."""
        x, cos, sin = (value if value.stride(-1) == 1 else value.contiguous() for value in inputs)
        return rotary.call(run, x, cos, sin)

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        return problem(
            self.kernel.name, outputs=self.heads * self.width, heads=self.heads, width=self.width,
            units=1, itemsize=dtype.itemsize, rows=rows,
        )  # fmt: skip

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shape = (1, rows, self.heads, self.width)
        x = torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)
        angles = torch.empty(rows, self.width, dtype=dtype, device="meta")
        return x, angles, angles


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, _aten.add.Tensor):
        for plain, turned in (node.args[:2], node.args[1::-1]):
            site = _site(module, node, plain, turned)
            if site is not None:
                yield site
                break


def _site(module: fx.GraphModule, node: fx.Node, plain: Any, turned: Any) -> Site | None:
    if not (is_call(plain, _aten.mul.Tensor) and is_call(turned, _aten.mul.Tensor)):
        return None
    x, cos = plain.args[:2]
    joined, sin = turned.args[:2]
    halves = _halves_of(joined, x)
    value = value_of(x)
    if halves is None or value is None or value.dim() != 4 or value.dtype not in FLOATS:
        return None
    if not all(isinstance(value.shape[i], int) for i in (1, 3)) or node.kwargs:
        return None
    if not (_has_equal_halves(module, cos, value) and _has_equal_halves(module, sin, value)):
        return None
    inside = (plain, turned, *halves)
    if any(not set(one.users) <= {node, *inside} for one in inside):
        return None
    heads, width, dtype = int(value.shape[1]), int(value.shape[3]), value.dtype

    def make(limit: int) -> Rotary:
        return Rotary(heads, width)

    def reference(limit: int, *values: Tensor) -> Tensor:
        x, cos, sin = values
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def sample(generator: torch.Generator) -> tuple[Tensor, ...]:
        angle = torch.rand(3, width // 2, generator=generator).repeat(1, 2) * 6
        x = torch.randn(1, 3, heads, width, generator=generator).to(dtype).transpose(1, 2)
        return x, angle.cos().to(dtype), angle.sin().to(dtype)

    return Site(node, (x, cos, sin), dtype, make, reference, sample, inside)


def _halves_of(joined: Any, x: Any) -> tuple[fx.Node, ...] | None:
    """The calls behind ``cat(-x2, x1)`` on the last axis, None where it is anything else."""
    if not is_call(joined, _aten.cat.default) or argument(joined, "dim") not in (-1, 3):
        return None
    parts = joined.args[0]
    if len(parts) != 2 or not is_call(parts[0], _aten.neg.default):
        return None
    second, first = parts[0].args[0], parts[1]
    for half, index in ((first, 0), (second, 1)):
        if not (is_call(half, getitem) and half.args[1] == index):
            return None
    chunk = first.args[0]
    if second.args[0] is not chunk or not is_call(chunk, _aten.chunk.default):
        return None
    if chunk.args[0] is not x or chunk.args[1] != 2 or argument(chunk, "dim") not in (-1, 3):
        return None
    return joined, parts[0], first, second, chunk


def _has_equal_halves(module: fx.GraphModule, angle: Any, x: Value) -> bool:
    """Whether it is rows of a stored table (tokens, width) whose halves are the same."""
    table = angle
    while is_call(table, _aten.slice.Tensor) and argument(table, "dim") == 0:
        table = table.args[0]
    stored, value = constant(module, table), value_of(angle)
    if stored is None or value is None or stored.dim() != 2 or stored.dtype != x.dtype:
        return False
    left, right = stored.chunk(2, 1)
    same_length = value.shape[0] == x.shape[2]
    return same_length and stored.shape[1] == x.shape[3] and torch.equal(left, right)


LOWERING = Lowering((ROTARY,), _find, order=1)
