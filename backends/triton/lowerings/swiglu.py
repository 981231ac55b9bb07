"""``silu(gate) * up`` in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from mopt.backends.triton.kernel import Amount, Kernel, Problem, only_tile, problem
from mopt.backends.triton.kernels import swiglu
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import KernelLayer
from mopt.backends.triton.match import FLOATS, calls, is_call, only_reader
from mopt.backends.triton.rewrite import Left, Lowering, Site
from mopt.backends.triton.values import value_of

_aten = torch.ops.aten


def _work(found: Problem) -> Amount:
    count = float(found["rows"] * found["outputs"])
    return Amount(5 * count, 0.0, 3 * count * found["itemsize"])


SWIGLU = Kernel("swiglu", only_tile, lambda config, found: None, _work)


class SwiGLU(KernelLayer):
    """The gated activation of two tensors of one shape."""

    kernel = SWIGLU
    buckets = (2048,)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].numel() // self.width, inputs[0].dtype

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Tensor:
        """``silu(gate) * up``."""
        return swiglu.forward(run, inputs[0].contiguous(), inputs[1].contiguous())

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        return problem(self.kernel.name, outputs=self.width, units=1, itemsize=dtype.itemsize,
                       rows=rows)  # fmt: skip

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.empty(rows, self.width, dtype=dtype, device="meta")
        return x, x


def _find(module: fx.GraphModule) -> Iterator[Site | Left]:
    for node in calls(module, _aten.mul.Tensor):
        for gate, up in (node.args[:2], node.args[1::-1]):
            if is_call(gate, _aten.silu.default) and only_reader(gate) is node:  # type: ignore[arg-type]
                site = _site(node, gate, up)  # type: ignore[arg-type]
                if site is not None:
                    yield site
                break


def _site(node: fx.Node, gate: fx.Node, up: fx.Node) -> Site | None:
    turn, other = value_of(gate), value_of(up)
    if turn is None or other is None or turn.shape != other.shape or turn.dtype != other.dtype:
        return None
    if turn.dtype not in FLOATS or not turn.dim() or not isinstance(turn.shape[-1], int):
        return None
    width, dtype, source = turn.shape[-1], turn.dtype, gate.args[0]
    assert isinstance(source, fx.Node)

    def reference(limit: int, *values: Tensor) -> Tensor:
        return swiglu.reference(values[0], values[1])

    def sample(generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(torch.randn(3, width, generator=generator).to(dtype) for _ in range(2))

    make = lambda limit: SwiGLU(width)  # noqa: E731 - a layer without weights
    return Site(node, (source, up), dtype, make, reference, sample, (gate,))


LOWERING = Lowering((SWIGLU,), _find, order=1)
