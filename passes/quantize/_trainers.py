"""Training the weights of one block; a block that is one product is trained some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from mopt.errors import InputError
from mopt.formats import Encoded, Grid, GridFormat
from mopt.formats.base import row_pieces
from mopt.formats.int_blocks import IntBlocks
from mopt.layers import Layer
from mopt.moments import ChannelMoments
from mopt.pass_base import PassContext
from mopt.passes.quantize._blocks import Block, input_moments, run_block
from mopt.program import Program
from mopt.streaming import Stream

_LINEAR = torch.ops.aten.linear.default
# Weights that are trained together where rows do not depend on each other: each takes some eight
# floats (itself, its two neighbours, the choice, a gradient, two means, what is computed with).
_TOGETHER = 1 << 20


class Trainable(Protocol):
    """The weight of one layer while it is trained."""

    def parameters(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer, with their learning rates."""

    def weight(self) -> Tensor:
        """The weight as it is computed with now; gradients are recorded."""

    def penalty(self, progress: float) -> Tensor | None:
        """What is added to the loss at a share of the training, or None."""

    def final(self) -> tuple[Tensor, Grid]:
        """The trained weight, whose nearest codes on the grid are meant, and the grid."""


@dataclass(frozen=True)
class Schedule:
    """How long blocks are trained: ``steps`` batches, the rates falling to a twentieth."""

    steps: int
    penalty_weight: float = 0.0


Make = Callable[[Layer, Tensor, IntBlocks, Tensor], Trainable]


def trainer_of(
    program: Program, block: Block, stream: Stream, original: Stream, ctx: PassContext
) -> BlockTrainer:
    """Reads what ``block`` gets from ``stream`` and should give from ``original``.

    Both streams stand at the block's first node, or before it.
    """
    calls = [node for node in block.nodes if node.op == "call_function"]
    (weight, *_) = [program.weight(layer.weight) for layer in block.layers]
    is_product = (
        len(block.layers) == 1 and block.layers[0].calls == tuple(calls) == block.outputs
        and len(calls) == 1 and calls[0].target is _LINEAR
    )  # fmt: skip
    if is_product and weight.numel() > _TOGETHER:
        original.advance(block.nodes[0])
        return ProductTrainer(program, block, stream, original, ctx)
    original.advance(block.nodes[-1].next)
    return BlockTrainer(program, block, stream, original, ctx)


class BlockTrainer:
    """One block with what it reads and should give, batch by batch."""

    def __init__(
        self, program: Program, block: Block, stream: Stream, original: Stream, ctx: PassContext
    ) -> None:
        self._program, self._block, self._ctx = program, block, ctx
        read = {node: stream.values(node) for node in block.inputs}
        self._inputs = [
            {node: values[at] for node, values in read.items()} for at in range(stream.batches)
        ]
        self._targets = self._read_targets(original)

    def _read_targets(self, original: Stream) -> list[list[Tensor]]:
        wanted = [original.values(node) for node in self._block.outputs]
        return [[values[at] for values in wanted] for at in range(original.batches)]

    def train(
        self, form: IntBlocks, schedule: Schedule, make: Make
    ) -> tuple[float, dict[Layer, Encoded]]:
        """The share of the starting error that is left, and each layer's encoding."""
        weights = {layer: self._program.weight(layer.weight) for layer in self._block.layers}
        moments = input_moments(self._program, self._block, self._inputs, _by_call(weights))
        self._require_finite(moments)
        return self._fit(weights, moments, form, schedule, make)

    def _require_finite(self, moments: dict[Layer, Tensor]) -> None:
        for layer, moment in moments.items():
            if not bool(moment.isfinite().all()):
                raise InputError(
                    f"the squares of what {layer.path!r} reads overflow on calibration data: they "
                    "hold NaN or infinity",
                    code="non-finite-activation",
                    site=layer.source or None,
                    hint="run the model on this data and look for the layer that overflows",
                )

    def _fit(
        self,
        weights: dict[Layer, Tensor],
        moments: dict[Layer, Tensor],
        form: IntBlocks,
        schedule: Schedule,
        make: Make,
    ) -> tuple[float, dict[Layer, Encoded]]:
        parts = {
            layer: make(layer, weight, form, moments[layer]) for layer, weight in weights.items()
        }
        start = _encoded(form, parts)
        first = self._error(_decoded(form, start))
        if not first > 0:
            return 1.0, start
        groups = [group for part in parts.values() for group in part.parameters()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        rates = [group["lr"] for group in optimizer.param_groups]
        random = torch.Generator().manual_seed(self._ctx.seed)
        order: list[int] = []
        for step in range(schedule.steps):
            self._ctx.check_time(f"training {self._block.path}")
            progress = step / schedule.steps
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _decay(progress)
            order = order or torch.randperm(len(self._inputs), generator=random).tolist()
            with torch.enable_grad():
                now = {layer: part.weight() for layer, part in parts.items()}
                loss = self._loss(order.pop(), _by_call(now)) / first
                for part in parts.values():
                    penalty = part.penalty(progress)
                    if penalty is not None:
                        loss = loss + schedule.penalty_weight / len(parts) * penalty
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        # Gradients and means of the size of the weights are of no use any more.
        del loss, now
        optimizer.zero_grad()
        optimizer.state.clear()
        end = _encoded(form, parts)
        left = self._error(_decoded(form, end)) / first
        return (left, end) if left < 1 else (1.0, start)

    def _loss(self, at: int, weights: dict[fx.Node, Tensor]) -> Tensor:
        """Squared error of a batch's outputs, each as a share of that output's power."""
        found = run_block(self._program, self._block, self._inputs[at], weights)
        losses = [_error_share(*pair) for pair in zip(found, self._targets[at], strict=True)]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _error(self, weights: dict[Layer, Tensor]) -> float:
        calls = _by_call(weights)
        losses = [float(self._loss(at, calls)) for at in range(len(self._inputs))]
        return sum(losses) / len(losses)


class ProductTrainer(BlockTrainer):
    """A block that is one large product: its rows do not depend on each other.

    Some are trained at a time. What they should give is computed when it is needed: the outputs of
    a vocabulary are larger than all that they are made of.
    """

    _rows: slice

    def _read_targets(self, original: Stream) -> list[list[Tensor]]:
        return [[value] for value in original.values(self._block.inputs[0])]

    def train(
        self, form: IntBlocks, schedule: Schedule, make: Make
    ) -> tuple[float, dict[Layer, Encoded]]:
        (layer,) = self._block.layers
        weight = self._program.weight(layer.weight)
        seen = ChannelMoments()
        for values in self._inputs:
            seen.add(values[self._block.inputs[0]])
        moments = {layer: seen.second.float()}
        self._require_finite(moments)
        kept = list[float]()

        def pieces() -> Iterator[Encoded]:
            for self._rows in row_pieces(weight, _TOGETHER):
                piece = {layer: weight[self._rows]}
                left, found = self._fit(piece, moments, form, schedule, make)
                kept.extend([left] * len(piece[layer]))
                yield found[layer]

        encoded = Encoded.join(pieces(), len(weight))
        return sum(kept) / len(kept), {layer: encoded}

    def _loss(self, at: int, weights: dict[fx.Node, Tensor]) -> Tensor:
        ((call, weight),) = weights.items()
        _, whole, *bias = (
            self._program.weight(one) if isinstance(one, fx.Node) and one.op == "get_attr" else one
            for one in call.args
        )
        added = bias[0][self._rows] if bias and bias[0] is not None else None
        linear = torch.nn.functional.linear
        target = linear(self._targets[at][0], whole[self._rows], added)
        return _error_share(linear(self._inputs[at][call.args[0]], weight, added), target)


def _error_share(value: Tensor, target: Tensor) -> Tensor:
    power = target.float().square().mean().clamp(min=1e-30)
    return (value.float() - target.float()).square().mean() / power


def _decay(progress: float) -> float:
    """A cosine from 1 to 1/20."""
    wave = float(torch.cos(torch.tensor(progress * torch.pi)))
    return 0.05 + 0.95 * 0.5 * (1 + wave)


def _encoded(form: GridFormat, parts: dict[Layer, Trainable]) -> dict[Layer, Encoded]:
    encoded = {}
    for layer, part in parts.items():
        weight, grid = part.final()
        encoded[layer] = form.encode(weight, grid=grid)
    return encoded


def _decoded(form: GridFormat, found: dict[Layer, Encoded]) -> dict[Layer, Tensor]:
    return {layer: form.decode(encoded) for layer, encoded in found.items()}


def _by_call(weights: dict[Layer, Tensor]) -> dict[fx.Node, Tensor]:
    return {call: weight for layer, weight in weights.items() for call in layer.calls}
