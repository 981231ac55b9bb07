"""A feed-forward block of low-rank layers: its wide middle stays in registers.

The first factors of up and gate are narrow products before, the second factor of down one after;
the kernel takes everything between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mopt.backends.triton.kernel import Kernel, Problem, problem
from mopt.backends.triton.kernels import flash_svd_ffn
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import ManyRowsLayer
from mopt.backends.triton.match import (
    activation_of,
    calls,
    is_call,
    linear_parts,
    only_reader,
)
from mopt.backends.triton.rewrite import Left, Lowering, Site
from mopt.backends.triton.values import value_of

FLASH_SVD_FFN = Kernel(
    "flash-svd-ffn", flash_svd_ffn.space, flash_svd_ffn.legal, flash_svd_ffn.work,
    flash_svd_ffn.grid,
)  # fmt: skip
_aten = torch.ops.aten


@dataclass(frozen=True)
class _Wide:
    """The second factor of up or gate: what it reads, weight (inner, rank) and bias."""

    node: fx.Node
    source: fx.Node
    weight: Tensor
    bias: Tensor | None


class FlashSvdFfn(ManyRowsLayer):
    """The middle of the block, from the first factors' outputs to that of down's first one."""

    kernel = FLASH_SVD_FFN
    buckets = (2048,)
    # A block of 32 rows goes over the whole middle alone: fewer rows leave half of a chip idle.
    least_rows = 2048

    def __init__(
        self, up: Tensor, bias: Tensor | None, gate: Tensor | None, down: Tensor, activation: str
    ) -> None:
        super().__init__()
        self.activation = activation
        # The kernel reads up and gate in tiles of one rank.
        rank = max(up.shape[1], 0 if gate is None else gate.shape[1])

        def factor(weight: Tensor) -> Tensor:
            return F.pad(weight.t(), (0, 0, 0, rank - weight.shape[1])).contiguous()

        self.register_buffer("up", factor(up))
        self.register_buffer("bias", bias)
        self.register_buffer("gate", None if gate is None else factor(gate))
        self.register_buffer("down", down.t().contiguous())

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].numel() // inputs[0].shape[-1], inputs[0].dtype

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Tensor:
        """(..., rank of down) from outputs of the first factors of up and gate."""
        shape, rank = inputs[0].shape, self.up.shape[0]
        flat = [F.pad(x.reshape(-1, x.shape[-1]), (0, rank - x.shape[-1])).contiguous()
                for x in inputs]  # fmt: skip
        gate = (flat[1], self.gate) if self.gate is not None else None
        out = flash_svd_ffn.call(
            run, (flat[0], self.up), self.down, gate=gate, bias=self.bias,
            activation=self.activation, config=config,
        )  # fmt: skip
        return out.view(*shape[:-1], self.down.shape[1])

    def without_kernel(self, *inputs: Tensor) -> Tensor:
        up = inputs[0] @ self.up[: inputs[0].shape[-1]]
        if self.bias is not None:
            up = up + self.bias
        function = getattr(F, self.activation)
        if self.gate is None:
            middle = function(up)
        else:
            middle = function(inputs[1] @ self.gate[: inputs[1].shape[-1]]) * up
        found: Tensor = middle @ self.down
        return found

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        rank, inner = self.up.shape
        return problem(
            self.kernel.name, inner=inner, rank=rank, rank_out=self.down.shape[1],
            outputs=self.down.shape[1], units=max(1, inner // 32), gated=self.gate is not None,
            bias=self.bias is not None, activation=self.activation, itemsize=dtype.itemsize,
            rows=rows,
        )  # fmt: skip

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        p = torch.empty(rows, self.up.shape[0], dtype=dtype, device="meta")
        return (p,) if self.gate is None else (p, p)


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, _aten.linear.default):
        down = linear_parts(module, node)
        middle = node.args[0]
        if down is None or down[1] is not None or not isinstance(middle, fx.Node):
            continue
        if down[0].shape[0] >= down[0].shape[1] or only_reader(middle) is not node:
            continue
        site = _site(module, node, middle, down[0])
        if site is not None:
            yield site


def _site(module: fx.GraphModule, node: fx.Node, middle: fx.Node, down: Tensor) -> Site | None:
    gate: _Wide | None = None
    plain: fx.Node | None = middle
    if is_call(middle, _aten.mul.Tensor):
        turn, other = _ordered(middle)
        if turn is None or only_reader(turn) is not middle:
            return None
        gate = _wide(module, turn.args[0], turn)
        plain, activation = other, activation_of(turn)
        if gate is None or gate.bias is not None:
            return None
    else:
        activation = activation_of(middle)
        plain = middle.args[0] if activation is not None else None  # type: ignore[assignment]
    up = _wide(module, plain, middle)
    if up is None or activation is None:
        return None
    ranks = [one.weight.shape[1] for one in (up, gate) if one is not None]
    if max(*ranks, down.shape[0]) > flash_svd_ffn.LARGEST_RANK:
        return None
    covers = [middle, up.node]
    inputs = [up.source]
    if gate is not None:
        covers += [gate.node, next(iter(gate.node.users))]
        inputs.append(gate.source)
    value = value_of(up.source)
    assert value is not None
    dtype = value.dtype

    def make(limit: int) -> FlashSvdFfn:
        return FlashSvdFfn(up.weight, up.bias, gate.weight if gate else None, down, activation)

    def reference(limit: int, *values: Tensor) -> Tensor:
        return make(limit).without_kernel(*values)

    def sample(generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(torch.randn(3, rank, generator=generator).to(dtype) for rank in ranks)

    return Site(node, tuple(inputs), dtype, make, reference, sample, tuple(covers))


def _ordered(product: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """(the activated factor, the other one) of a product."""
    a, b = product.args[:2]
    for turn, other in ((a, b), (b, a)):
        if is_call(turn, _aten.silu.default) and isinstance(other, fx.Node):
            return turn, other  # type: ignore[return-value]
    return None, None


def _wide(module: fx.GraphModule, node: object, reader: fx.Node) -> _Wide | None:
    """A second factor, read only by ``reader``, whose first one is narrower than it is wide."""
    if not isinstance(node, fx.Node) or only_reader(node) is not reader:
        return None
    parts, source = linear_parts(module, node), node.args[0]
    if parts is None or not isinstance(source, fx.Node) or linear_parts(module, source) is None:
        return None
    weight, bias = parts
    return _Wide(node, source, weight, bias) if weight.shape[1] < weight.shape[0] else None


LOWERING = Lowering((FLASH_SVD_FFN,), _find, order=-1)
