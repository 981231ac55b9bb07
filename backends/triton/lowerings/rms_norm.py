"""RMS norm, and the sum with a residual before it, in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from mopt.backends.triton.kernel import Amount, Kernel, Problem, only_tile, problem
from mopt.backends.triton.kernels import rms_norm
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import KernelLayer
from mopt.backends.triton.lowerings._norm import RMS_NORM, Norm, read_norm
from mopt.backends.triton.match import calls, is_call
from mopt.backends.triton.rewrite import Left, Lowering, Site
from mopt.backends.triton.values import value_of

_add = torch.ops.aten.add.Tensor


def _work(found: Problem) -> Amount:
    count = float(found["rows"] * found["outputs"])
    tensors = 4 if found["residual"] else 2
    return Amount(4 * count, found["outputs"] * found["itemsize"],
                  tensors * count * found["itemsize"])  # fmt: skip


KERNEL = Kernel("rms-norm", only_tile, lambda config, found: None, _work)


class RmsNorm(KernelLayer):
    """The norm of ``x``, or of ``x + residual`` together with that sum."""

    kernel = KERNEL
    buckets = (2048,)

    def __init__(self, weight: Tensor, eps: float, residual: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps, self.residual = eps, residual

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].numel() // self.weight.numel(), inputs[0].dtype

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Any:
        """The norm over the last axis; with a residual (norm, sum)."""
        width, shape = self.weight.numel(), inputs[0].shape
        flat = [value.reshape(-1, width).contiguous() for value in inputs]
        out, total, _ = rms_norm.forward(run, flat[0], self.weight, self.eps, *flat[1:])
        return (out.view(shape), total.view(shape)) if self.residual else out.view(shape)

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        return problem(
            self.kernel.name, outputs=self.weight.numel(), units=1, residual=self.residual,
            itemsize=dtype.itemsize, rows=rows,
        )  # fmt: skip

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.empty(rows, self.weight.numel(), dtype=dtype, device="meta")
        return (x, x) if self.residual else (x,)


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, RMS_NORM):
        norm = read_norm(module, node)
        if norm is None:
            yield Left(node, "its weight is computed, or it is over more than the last axis")
        elif norm.width > rms_norm.WIDEST:
            yield Left(node, f"rows of {norm.width} values do not fit registers, at most "
                             f"{rms_norm.WIDEST}")  # fmt: skip
        else:
            yield _site(node, norm, _is_residual(norm))


def _is_residual(norm: Norm) -> bool:
    """Whether the norm reads a sum of two tensors of its own shape and type."""
    if not is_call(norm.x, _add) or norm.x.kwargs:
        return False
    total, parts = value_of(norm.x), [value_of(part) for part in norm.x.args[:2]]
    return total is not None and all(
        part is not None and part.shape == total.shape and part.dtype == total.dtype
        for part in parts
    )


def _site(node: fx.Node, norm: Norm, residual: bool) -> Site:
    weight = torch.ones(norm.width, dtype=norm.dtype) if norm.weight is None else norm.weight
    inputs = tuple(norm.x.args[:2]) if residual else (norm.x,)

    def make(limit: int) -> RmsNorm:
        return RmsNorm(weight, norm.eps, residual)

    def reference(limit: int, *values: Tensor) -> Any:
        total = values[0] + values[1] if residual else values[0]
        return (norm.apply(total), total) if residual else norm.apply(total)

    def sample(generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(torch.randn(3, norm.width, generator=generator).to(norm.dtype) for _ in inputs)

    also = (norm.x,) if residual else ()
    return Site(node, inputs, norm.dtype, make, reference, sample, (), also)  # type: ignore[arg-type]


LOWERING = Lowering((KERNEL,), _find, order=1)
