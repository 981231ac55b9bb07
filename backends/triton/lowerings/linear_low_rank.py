"""Two thin linears, one behind the other, as factorizing leaves them: one kernel, no middle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mopt.backends.triton.kernel import Kernel, Problem, problem
from mopt.backends.triton.kernels import linear_low_rank
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import ManyRowsLayer
from mopt.backends.triton.match import calls, linear_parts, only_reader
from mopt.backends.triton.rewrite import Left, Lowering, Site, rows_sample
from mopt.backends.triton.values import value_of

LINEAR_LOW_RANK = Kernel(
    "linear-low-rank", linear_low_rank.space, linear_low_rank.legal, linear_low_rank.work
)
_linear = torch.ops.aten.linear.default


class LowRankLinear(ManyRowsLayer):
    """``outer @ (inner @ x) + bias``; two products by PyTorch where there are few rows."""

    kernel = LINEAR_LOW_RANK
    buckets = (64, 256, 2048)
    # Below, a chip is filled by splitting each product along K, which PyTorch's do.
    least_rows = 32

    def __init__(self, inner: Tensor, outer: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("inner", inner.contiguous())
        self.register_buffer("outer", outer.contiguous())
        self.register_buffer("bias", bias)

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].numel() // self.inner.shape[1], inputs[0].dtype

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Tensor:
        """The outputs over the last axis."""
        (x,) = inputs
        flat = x.reshape(-1, self.inner.shape[1]).contiguous()
        out = linear_low_rank.call(run, config, flat, self.inner, self.outer, self.bias)
        return out.reshape(*x.shape[:-1], self.outer.shape[0])

    def without_kernel(self, *inputs: Tensor) -> Tensor:
        return F.linear(F.linear(inputs[0], self.inner), self.outer, self.bias)

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        (rank, columns), outputs = self.inner.shape, self.outer.shape[0]
        return problem(
            self.kernel.name, outputs=outputs, columns=columns, rank=rank,
            units=max(1, columns // 64), bias=self.bias is not None, itemsize=dtype.itemsize,
            rows=rows,
        )  # fmt: skip

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.empty(rows, self.inner.shape[1], dtype=dtype, device="meta"),)


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, _linear):
        inner, outer = linear_parts(module, node.args[0]), linear_parts(module, node)
        if inner is None or outer is None or inner[1] is not None:
            continue
        thin = node.args[0]
        assert isinstance(thin, fx.Node)
        rank, columns = inner[0].shape
        if rank >= min(columns, outer[0].shape[0]) or only_reader(thin) is not node:
            continue
        if rank > linear_low_rank.LARGEST_RANK:
            yield Left(node, f"a middle of rank {rank} does not fit registers, which hold up to "
                             f"{linear_low_rank.LARGEST_RANK}")  # fmt: skip
            continue
        yield _site(node, thin, inner[0], *outer)


def _site(node: fx.Node, thin: fx.Node, inner: Tensor, outer: Tensor, bias: Tensor | None) -> Site:
    x = thin.args[0]
    value = value_of(x)
    assert isinstance(x, fx.Node) and value is not None

    def make(limit: int) -> LowRankLinear:
        size = limit or outer.shape[0]
        return LowRankLinear(inner, outer[:size], None if bias is None else bias[:size])

    def reference(limit: int, values: Tensor) -> Tensor:
        return make(limit).without_kernel(values)

    sample = rows_sample(inner.shape[1], value.dtype)
    return Site(node, (x,), value.dtype, make, reference, sample, (thin,))


LOWERING = Lowering((LINEAR_LOW_RANK,), _find, order=0)
