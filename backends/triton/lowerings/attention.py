"""``scaled_dot_product_attention`` without a mask of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from mopt.backends.triton.kernel import Kernel, Problem, problem
from mopt.backends.triton.kernels import flash_attention
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import KernelLayer
from mopt.backends.triton.match import FLOATS, calls
from mopt.backends.triton.rewrite import Left, Lowering, Site
from mopt.backends.triton.values import value_of
from mopt.effects import argument

FLASH_ATTENTION = Kernel(
    "flash-attention", flash_attention.space, flash_attention.legal, flash_attention.work,
    flash_attention.grid,
)  # fmt: skip
# Keys that a tile for a few queries is chosen for: a cache of some length.
_CACHE = 4096
WIDEST = 256

_sdpa = torch.ops.aten.scaled_dot_product_attention.default


class Attention(KernelLayer):
    """Attention with ``group`` query heads to each of ``heads`` heads of keys."""

    kernel = FLASH_ATTENTION
    buckets = (16, 64, 2048)

    def __init__(
        self, heads: int, group: int, width: int, causal: bool, scale: float | None, batch: int
    ) -> None:
        super().__init__()
        self.heads, self.group, self.width, self.batch = heads, group, width, batch
        self.causal, self.scale = causal, scale

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].shape[2] * self.group, inputs[0].dtype

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Tensor:
        """Outputs (batch, heads, queries, width); causal: query ``i`` sees keys to ``i``."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
        return flash_attention.call(
            run, config, q, k, v, causal=self.causal, scale=self.scale, offset=0
        )[0]

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        keys = _CACHE if rows <= 16 else max(64, rows // self.group)
        return problem(
            self.kernel.name, batch=self.batch, heads=self.heads, group=self.group,
            width=self.width, outputs=self.heads * self.group * self.width, causal=self.causal,
            units=max(1, keys // 64), keys=keys, keysize=dtype.itemsize, itemsize=dtype.itemsize,
            rows=rows,
        )  # fmt: skip

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        queries = -(-rows // self.group)
        keys = max(queries, self.problem(rows, dtype)["keys"])

        def tensor(tokens: int, heads: int) -> Tensor:
            shape = (self.batch, tokens, heads, self.width)
            return torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)

        k = tensor(keys, self.heads)
        return tensor(queries, self.heads * self.group), k, k


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, _sdpa):
        reason = _reason(node)
        yield Left(node, reason) if reason else _site(node)


def _reason(node: fx.Node) -> str | None:
    values = [value_of(node.args[i]) for i in range(3)]
    if any(value is None or value.dim() != 4 for value in values):
        return "queries, keys and values are not (batch, heads, tokens, width)"
    q, k, v = (value for value in values if value is not None)
    if argument(node, "attn_mask") is not None:
        return "it has a mask of its own"
    if argument(node, "dropout_p"):
        return "it drops weights by chance"
    if q.dtype not in FLOATS:
        return f"queries in {q.dtype}"
    if not all(isinstance(n, int) for x in (q, k, v) for n in (x.shape[1], x.shape[3])):
        return "the number of heads or their width is not fixed"
    if v.shape[3] != q.shape[3] or v.shape[1] != k.shape[1] or int(q.shape[1]) % int(k.shape[1]):
        return "heads of keys and values differ"
    if int(q.shape[3]) > WIDEST:
        return f"heads of {q.shape[3]} values, kernels take up to {WIDEST}"
    return None


def _site(node: fx.Node) -> Site:
    q, k = value_of(node.args[0]), value_of(node.args[1])
    assert q is not None and k is not None
    causal = bool(argument(node, "is_causal"))
    scale = node.kwargs.get("scale")
    assert scale is None or isinstance(scale, float)
    width, heads, dtype = int(q.shape[3]), int(k.shape[1]), q.dtype
    group, batch = int(q.shape[1]) // heads, q.hints[0]

    def make(limit: int) -> Attention:
        return Attention(heads, group, width, causal, scale, batch)

    def reference(limit: int, *values: Tensor) -> Tensor:
        found: Tensor = torch.nn.functional.scaled_dot_product_attention(
            values[0], values[1], values[2], is_causal=causal, scale=scale, enable_gqa=group > 1
        )
        return found

    def sample(generator: torch.Generator) -> tuple[Tensor, ...]:
        shapes = ((1, group, 5, width), (1, 1, 7, width), (1, 1, 7, width))
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        return q, k, v

    inputs = tuple(node.args[:3])
    return Site(node, inputs, dtype, make, reference, sample)  # type: ignore[arg-type]


LOWERING = Lowering((FLASH_ATTENTION,), _find)
