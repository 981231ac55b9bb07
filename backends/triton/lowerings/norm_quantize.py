"""A norm whose result is rounded to 8 bits with a known range: norm and codes in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from mopt.backends.triton.kernel import Amount, Kernel, Problem, only_tile, problem
from mopt.backends.triton.kernels import norm_quantize
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import KernelLayer
from mopt.backends.triton.lowerings._norm import LAYER_NORM, RMS_NORM, Norm, read_norm
from mopt.backends.triton.match import calls, constants, is_call, only_reader
from mopt.backends.triton.rewrite import Left, Lowering, Site

_quantize = torch.ops.mopt.quantize.default


def _work(found: Problem) -> Amount:
    count = float(found["rows"] * found["outputs"])
    return Amount(6 * count, 2.0 * found["outputs"] * found["itemsize"],
                  count * (found["itemsize"] + 1))  # fmt: skip


KERNEL = Kernel("norm-quantize", only_tile, lambda config, found: None, _work)


class NormQuantize(KernelLayer):
    """Codes of a norm, as ``mopt::quantize`` gives them."""

    kernel = KERNEL
    buckets = (2048,)

    def __init__(self, norm: Norm, scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        self.eps, self.centered, self.width = norm.eps, norm.centered, norm.width
        self.register_buffer("weight", norm.weight)
        self.register_buffer("bias", norm.bias)
        self.register_buffer("scale", scale.float().reshape(1))
        self.register_buffer("zero", zero.reshape(1))

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].numel() // self.width, inputs[0].dtype

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Tensor:
        """Codes shaped as the input."""
        x = inputs[0]
        codes = norm_quantize.call_static(
            run, x.reshape(-1, self.width).contiguous(), self.weight, self.eps, self.scale,
            self.zero, bias=self.bias, centered=self.centered,
        )  # fmt: skip
        return codes.view(x.shape)

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        return problem(
            self.kernel.name, outputs=self.width, units=1, centered=self.centered,
            weight=self.weight is not None, bias=self.bias is not None,
            codes=str(self.zero.dtype)[6:], itemsize=dtype.itemsize, rows=rows,
        )  # fmt: skip

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.empty(rows, self.width, dtype=dtype, device="meta"),)


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, RMS_NORM, LAYER_NORM):
        reader = only_reader(node)
        if reader is None or not is_call(reader, _quantize) or reader.args[0] is not node:
            continue
        norm, stored = read_norm(module, node), constants(module, reader.args[1:3])
        if norm is None or stored is None or norm.width > norm_quantize.WIDEST:
            continue
        scale, zero = stored
        if scale is None or zero is None or scale.numel() != 1 or zero.numel() != 1:
            continue
        if zero.dtype in (torch.uint8, torch.int8):
            yield _site(node, reader, norm, scale, zero)


def _site(node: fx.Node, reader: fx.Node, norm: Norm, scale: Tensor, zero: Tensor) -> Site:
    def make(limit: int) -> NormQuantize:
        return NormQuantize(norm, scale, zero)

    def reference(limit: int, values: Tensor) -> Tensor:
        codes: Tensor = _quantize(norm.apply(values), scale, zero, 0)
        return codes

    def sample(generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(3, norm.width, generator=generator).to(norm.dtype),)

    return Site(reader, (norm.x,), norm.dtype, make, reference, sample, (node,))


LOWERING = Lowering((KERNEL,), _find, order=0)
