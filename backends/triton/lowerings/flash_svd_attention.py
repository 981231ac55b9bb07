"""Attention between low-rank q, k and v, which no rotation parts from it: the absorbed form.

The first factors stay products of PyTorch's; second factors, heads and attention are one kernel, so
that queries, keys and values of full width are never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mopt.backends.triton.kernel import Kernel, Problem, problem
from mopt.backends.triton.kernels import flash_svd_attention
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import ManyRowsLayer
from mopt.backends.triton.lowerings._masks import Band, band_of
from mopt.backends.triton.match import FLOATS, calls, constant, is_call, linear_parts, only_reader
from mopt.backends.triton.rewrite import Lowering, Site
from mopt.backends.triton.values import value_of
from mopt.effects import argument

FLASH_SVD_ATTENTION = Kernel(
    "flash-svd-attention", flash_svd_attention.space, flash_svd_attention.legal,
    flash_svd_attention.work, flash_svd_attention.grid,
)  # fmt: skip
_aten = torch.ops.aten


@dataclass(frozen=True)
class _Factors:
    """What makes queries, keys or values: the first factor's output, and the second factor."""

    source: fx.Node
    weight: Tensor
    bias: Tensor | None
    covers: tuple[fx.Node, ...]

    @property
    def rank(self) -> int:
        """The width of what the first factor gives."""
        return int(self.weight.shape[1])


class FlashSvdAttention(ManyRowsLayer):
    """From the first factors' outputs (batch, tokens, rank) to (batch, heads, tokens, width)."""

    kernel = FLASH_SVD_ATTENTION
    buckets = (64, 512, 2048)
    least_rows = 32

    def __init__(
        self, heads: int, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...],
        causal: bool, scale: float | None, batch: int, masked: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.width = heads, weights[0].shape[0] // heads
        self.causal, self.scale, self.batch, self.masked = causal, scale, batch, masked
        for name, weight in zip("qkv", weights, strict=True):
            # (heads, rank, width) of (heads * width, rank)
            split = weight.unflatten(0, (heads, -1)).transpose(1, 2)
            self.register_buffer(name, split.contiguous())
        # The bias of keys adds one number to all scores of a query, which softmax takes away.
        for name, bias in (("q_bias", biases[0]), ("v_bias", biases[2])):
            split_bias = None if bias is None else bias.unflatten(0, (heads, -1)).contiguous()
            self.register_buffer(name, split_bias)

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].shape[1], inputs[0].dtype

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Tensor:
        """The outputs of attention, every head's own."""
        pairs = [
            (
                (p if p.stride(-1) == 1 else p.contiguous())[:, None].expand(
                    -1, self.heads, -1, -1
                ),
                f,
            )
            for p, f in zip(inputs, (self.q, self.k, self.v), strict=False)
        ]
        return flash_svd_attention.call(
            run, pairs[0], pairs[1], pairs[2], bias=self.q_bias, v_bias=self.v_bias,
            causal=self.causal, offset=0, scale=self.scale, config=config,
            mask=inputs[3] if self.masked else None,
        )  # fmt: skip

    def without_kernel(self, *inputs: Tensor) -> Tensor:
        q, k, v = (
            p[:, None] @ factor for p, factor in zip(inputs, (self.q, self.k, self.v), strict=False)
        )
        if self.q_bias is not None:
            q = q + self.q_bias[:, None]
        if self.v_bias is not None:
            v = v + self.v_bias[:, None]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=inputs[3] if self.masked else None, is_causal=self.causal,
            scale=self.scale,
        )  # fmt: skip

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        ranks = {f"rank_{name}": getattr(self, name).shape[1] for name in "qkv"}
        return problem(
            self.kernel.name, batch=self.batch, heads=self.heads, width=self.width, **ranks,
            outputs=self.heads * self.width, causal=self.causal, masked=self.masked,
            bias=self.q_bias is not None, v_bias=self.v_bias is not None,
            units=max(1, rows // 64), keys=rows, itemsize=dtype.itemsize, rows=rows,
        )  # fmt: skip

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        made = [torch.empty(self.batch, rows, getattr(self, name).shape[1], dtype=dtype,
                            device="meta") for name in "qkv"]  # fmt: skip
        if self.masked:
            made.append(torch.empty(self.batch, 1, 1, rows, dtype=torch.bool, device="meta"))
        return tuple(made)


def _find(module: fx.GraphModule) -> Iterator[Site]:
    for node in calls(module, _aten.scaled_dot_product_attention.default):
        found = [_factors(module, node.args[i], node) for i in range(3)]
        site = _site(module, node, [one for one in found if one is not None])
        if site is not None:
            yield site


def _factors(module: fx.GraphModule, value: object, reader: fx.Node) -> _Factors | None:
    """The factors behind (batch, heads, tokens, width); nothing else reads what is between."""
    if not isinstance(value, fx.Node) or not is_call(value, _aten.transpose.int):
        return None
    split = value.args[0]
    if sorted(int(axis) % 4 for axis in value.args[1:3]) != [1, 2]:  # type: ignore[arg-type]
        return None
    if not is_call(split, _aten.unflatten.int, _aten.view.default, _aten.reshape.default):
        return None
    assert isinstance(split, fx.Node)
    outer = split.args[0]
    parts = linear_parts(module, outer)
    if parts is None or not isinstance(outer, fx.Node):
        return None
    thin = outer.args[0]
    first = linear_parts(module, thin)
    seen, whole = value_of(thin), value_of(split)
    if first is None or not isinstance(thin, fx.Node) or seen is None or whole is None:
        return None
    readers = [(value, reader), (split, value), (outer, split), (thin, outer)]
    if any(only_reader(one) is not wanted for one, wanted in readers):
        return None
    weight, bias = parts
    if seen.dim() != 3 or whole.dim() != 4 or weight.shape[1] >= weight.shape[0]:
        return None
    if (whole.shape[0], whole.shape[1]) != (seen.shape[0], seen.shape[1]):
        return None
    return _Factors(thin, weight, bias, (outer, split, value))


def _site(module: fx.GraphModule, node: fx.Node, found: list[_Factors]) -> Site | None:
    if len(found) != 3 or argument(node, "dropout_p"):
        return None
    values = [value_of(node.args[i]) for i in range(3)]
    q, k, v = (value for value in values if value is not None)
    heads = q.shape[1]
    if not isinstance(heads, int) or q.dtype not in FLOATS:
        return None
    if any(value.shape[1] != heads or value.shape[3] != q.shape[3] for value in (k, v)):
        return None
    if max(one.rank for one in found) > flash_svd_attention.LARGEST_RANK:
        return None
    inputs = tuple(one.source for one in found)
    causal = bool(argument(node, "is_causal"))
    mask, masked = argument(node, "attn_mask"), False
    stored = constant(module, mask)
    if stored is not None:
        band = band_of(stored, q.hints[2], k.hints[2])
        if band is None or band != Band(band.causal):
            return None
        causal = band.causal
    elif mask is not None:
        while is_call(mask, _aten.expand.default):
            mask = mask.args[0]
        value = value_of(mask)
        if value is None or value.dtype != torch.bool or value.shape[1:3] != (1, 1):
            return None
        inputs, masked = (*inputs, mask), True
    scale = node.kwargs.get("scale")
    assert scale is None or isinstance(scale, float)
    dtype, batch = q.dtype, q.hints[0]

    def make(limit: int) -> FlashSvdAttention:
        weights, biases = zip(*((one.weight, one.bias) for one in found), strict=True)
        return FlashSvdAttention(heads, weights, biases, causal, scale, batch, masked)

    def reference(limit: int, *values: Tensor) -> Tensor:
        q, k, v = (
            F.linear(p, one.weight, one.bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for p, one in zip(values, found, strict=False)
        )
        made: Tensor = F.scaled_dot_product_attention(
            q, k, v, attn_mask=values[3] if masked else None, is_causal=causal, scale=scale
        )
        return made

    def sample(generator: torch.Generator) -> tuple[Tensor, ...]:
        drawn = [torch.randn(1, 5, one.rank, generator=generator).to(dtype) for one in found]
        if masked:
            drawn.append(torch.arange(5).reshape(1, 1, 1, 5) < 4)
        return tuple(drawn)

    covers = tuple(call for one in found for call in one.covers)
    return Site(node, inputs, dtype, make, reference, sample, covers)


LOWERING = Lowering((FLASH_SVD_ATTENTION,), _find, order=-1)
