"""``scaled_dot_product_attention``: stored masks that are causal or sliding by their numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from mopt.backends.triton.kernel import Kernel, Problem, problem
from mopt.backends.triton.kernels import flash_attention
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import KernelLayer
from mopt.backends.triton.lowerings._masks import Band, band_of
from mopt.backends.triton.match import FLOATS, calls, constant, is_call
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
    """Attention with ``group`` query heads to each of ``heads`` heads of keys.

    Without ``mask`` it has three inputs, else such a mask as the fourth: its type, and if it is the
    same for all heads and queries.
    """

    kernel = FLASH_ATTENTION
    buckets = (16, 64, 2048)

    def __init__(
        self, heads: int, group: int, width: int, band: Band, scale: float | None, batch: int,
        mask: tuple[torch.dtype, bool] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.group, self.width, self.batch = heads, group, width, batch
        self.band, self.scale, self.mask = band, scale, mask

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].shape[2] * self.group, inputs[0].dtype

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Tensor:
        """Outputs (batch, heads, queries, width) of queries, keys, values and perhaps a mask."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs[:3])
        return flash_attention.call(
            run, config, q, k, v, causal=self.band.causal, window=self.band.window,
            scale=self.scale, offset=self.band.offset, mask=inputs[3] if inputs[3:] else None,
        )[0]  # fmt: skip

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        keys = _CACHE if rows <= 16 else max(64, rows // self.group)
        return problem(
            self.kernel.name, batch=self.batch, heads=self.heads, group=self.group,
            width=self.width, outputs=self.heads * self.group * self.width,
            causal=self.band.causal, sliding=self.band.window is not None,
            masked=_masked(self.mask), units=max(1, keys // 64), keys=keys,
            keysize=dtype.itemsize, itemsize=dtype.itemsize, rows=rows,
        )  # fmt: skip

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        queries = -(-rows // self.group)
        keys = max(queries, self.problem(rows, dtype)["keys"])

        def tensor(tokens: int, heads: int) -> Tensor:
            shape = (self.batch, tokens, heads, self.width)
            return torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)

        k = tensor(keys, self.heads)
        q = tensor(queries, self.heads * self.group)
        if self.mask is None:
            return q, k, k
        kind, same = self.mask
        shape = (self.batch, 1, 1 if same else queries, keys)
        return q, k, k, torch.empty(shape, dtype=kind, device="meta")


def _masked(mask: tuple[torch.dtype, bool] | None) -> str:
    """What a tile is chosen for."""
    if mask is None:
        return "no"
    return f"{'keys' if mask[1] else 'scores'} {'bool' if mask[0] == torch.bool else 'float'}"


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, _sdpa):
        reason = _reason(node)
        yield Left(node, reason) if reason else _site(module, node)


def _reason(node: fx.Node) -> str | None:
    values = [value_of(node.args[i]) for i in range(3)]
    if any(value is None or value.dim() != 4 for value in values):
        return "queries, keys and values are not (batch, heads, tokens, width)"
    q, k, v = (value for value in values if value is not None)
    mask = argument(node, "attn_mask")
    if mask is not None:
        seen = value_of(mask)
        if seen is None or seen.dtype not in (torch.bool, q.dtype):
            return "its mask is neither of truth values nor of the queries' type"
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


def _site(module: fx.GraphModule, node: fx.Node) -> Site:
    q, k = value_of(node.args[0]), value_of(node.args[1])
    assert q is not None and k is not None
    scale = node.kwargs.get("scale")
    assert scale is None or isinstance(scale, float)
    width, heads, dtype = int(q.shape[3]), int(k.shape[1]), q.dtype
    group, batch = int(q.shape[1]) // heads, q.hints[0]
    mask = argument(node, "attn_mask")
    stored = constant(module, mask)
    band = None
    if stored is not None:
        band = band_of(stored, q.hints[2], k.hints[2])
    elif mask is None:
        band = Band(bool(argument(node, "is_causal")))
    read: tuple[torch.dtype, bool] | None = None
    inputs = tuple(node.args[:3])
    if band is None:
        # What was widened to all queries is read before that.
        while is_call(mask, torch.ops.aten.expand.default):
            mask = mask.args[0]
        value = value_of(mask)
        assert value is not None
        read = value.dtype, all(size == 1 for size in value.shape[-3:-1])
        inputs = (*inputs, mask)

    def make(limit: int) -> Attention:
        return Attention(heads, group, width, band or Band(), scale, batch, read)

    def reference(limit: int, *values: Tensor) -> Tensor:
        q, k, v = values[:3]
        seen = values[3] if band is None else band.seen(q.shape[2], k.shape[2])
        found: Tensor = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=group > 1
        )
        return found

    def sample(generator: torch.Generator) -> tuple[Tensor, ...]:
        shapes = ((1, group, 5, width), (1, 1, 7, width), (1, 1, 7, width))
        drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        if read is not None:
            seen = torch.randn(1, 1, 1 if read[1] else 5, 7, generator=generator)
            drawn.append(seen > -1 if read[0] == torch.bool else seen.to(dtype))
        return tuple(drawn)

    return Site(node, inputs, dtype, make, reference, sample)  # type: ignore[arg-type]


LOWERING = Lowering((FLASH_ATTENTION,), _find)
