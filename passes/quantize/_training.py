"""Training the rounded weights of one block after another towards the original block's outputs.

:class:`BlockTraining` is the base of the passes that do so; they say how a weight is trained.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from mopt.errors import InputError
from mopt.formats import Encoded, Grid, GridFormat
from mopt.formats.int_blocks import IntBlocks
from mopt.layers import Layer
from mopt.pass_base import NEEDS_DATA, Pass, PassContext, PassResult, Skip, option
from mopt.passes.quantize._blocks import Block, find_blocks, input_moments, run_block
from mopt.passes.quantize._calibrated import choose_formats, grid_for
from mopt.passes.quantize._gptq import Inputs, round_with_feedback
from mopt.passes.quantize._weights import is_small, kernel_notice, relative_error
from mopt.program import Program
from mopt.streaming import Stream


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


@dataclass(frozen=True, kw_only=True)
class BlockTraining(Pass):
    """What the passes that train rounded weights block by block share: options and the loop.

    A subclass says with :meth:`_start` how the weight of one layer is trained.
    """

    bits: int = option(4, choices=(2, 3, 4, 8), help="bits per weight")
    group: int = option(
        32, choices=(0, 16, 32, 64, 128), help="weights that share a scale; 0: a whole row"
    )
    symmetric: bool = option(True, help="no zero points: fewer bytes, a little more error")
    start: str = option(
        "gptq", choices=("gptq", "nearest"), help="the codes and scales that training starts from"
    )
    ranges: str = option(
        "output", choices=("output", "mse", "min-max"), help="what scales minimize at first"
    )
    steps: int = option(300, min=1, help="training steps per block")
    activations: str = option(
        "int8", choices=("int8", "float"), help="whether a kernel may round the input to 8 bits"
    )
    min_size: int = option(4096, min=0, help="leave layers with fewer weights alone")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def notice(self, backend: str) -> str | None:
        return kernel_notice(self.form, backend)

    @property
    def form(self) -> IntBlocks:
        """The format that the options describe."""
        return IntBlocks(self.bits, self.group, not self.symmetric, self.activations)

    @abstractmethod
    def _start(
        self, layer: Layer, weight: Tensor, form: IntBlocks, start: Tensor, grid: Grid
    ) -> Trainable:
        """The weight as it starts out on the grid with the codes of ``start``."""

    def _train(
        self, program: Program, ctx: PassContext, *, whole: bool, penalty: float = 0.0
    ) -> PassResult:
        """Train every selected linear layer; ``whole`` takes the layers of a module together."""

        def make(layer: Layer, weight: Tensor, form: IntBlocks, moment: Tensor) -> Trainable:
            start, grid = first_codes(weight, moment, form, self.start, self.ranges)
            return self._start(layer, weight, form, start, grid)

        schedule = Schedule(self.steps, penalty)
        return train_blocks(self, program, ctx, self.form, self.min_size, whole, schedule, make)


def train_blocks(
    one: Pass,
    program: Program,
    ctx: PassContext,
    form: IntBlocks,
    min_size: int,
    whole: bool,
    schedule: Schedule,
    make: Make,
) -> PassResult:
    """Encode every selected linear layer in ``form`` with weights that ``make`` starts training.

    The blocks are trained in order, on what the trained blocks before them give, towards what the
    original program gives there. A block that training made worse than the codes it started from,
    on all calibration data, keeps those.
    """
    assert ctx.calibration is not None

    def choose(layer: Layer, weight: Tensor) -> GridFormat | str:
        if layer.kind != "linear":
            return f"only linear layers have a kernel for weights in groups, not {layer.kind}s"
        if weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            return f"the weight is {kind}, training needs float32: call model.float()"
        return is_small(layer, min_size) or form

    forms, skipped = choose_formats(one, program, ("linear", "convolution", "embedding"), choose)
    layers = list(forms)
    if not layers:
        return PassResult(changed=False, stats={"layers": 0}, skipped=skipped)
    stream = Stream(program, ctx.calibration.for_part(program), ctx)
    original = Stream(program, ctx.calibration.for_part(program), ctx)
    after = {node: node.next for node in program.graph.nodes}
    encoded: dict[Layer, Encoded] = {}
    stats: dict[str, Any] = {"layers": 0, "formats": {}, "weight_error": {}, "error_kept": {}}
    blocks = find_blocks(program, layers, whole=whole)
    for index, block in enumerate(blocks):
        ctx.progress.step(index, len(blocks), "blocks")
        if not block.outputs:
            skipped.append(Skip(block.path, "nothing that the model returns depends on it"))
            continue
        stream.advance(block.nodes[0])
        original.advance(after[block.nodes[-1]])
        trainer = _Trainer(program, block, stream, original, ctx)
        kept, found = trainer.train(form, schedule, make)
        for layer, (weight, grid) in found.items():
            encoded[layer] = form.encode(weight, grid=grid)
            decoded = form.decode(encoded[layer])
            stream.replace_weight(layer.calls, layer.weight, decoded)
            stats["formats"][layer.path] = form.name
            stats["weight_error"][layer.path] = relative_error(
                program.weight(layer.weight), decoded
            )
        stats["error_kept"][block.path] = kept
    for layer, one_encoded in encoded.items():
        form.place(program, layer, one_encoded)
    stats["layers"] = len(encoded)
    stats["batches"] = stream.batches
    stats["peak_activation_bytes"] = stream.peak_bytes + original.peak_bytes
    return PassResult(changed=bool(encoded), stats=stats, skipped=skipped)


def first_codes(
    weight: Tensor, moment: Tensor, form: IntBlocks, start: str, ranges: str
) -> tuple[Tensor, Grid]:
    """What training starts from: a weight whose nearest codes on the grid are meant, and the grid.

    ``start`` "nearest" is the weight itself on scales found by ``ranges``, "gptq" what GPTQ makes
    of it for inputs with that second moment.
    """
    grid = grid_for(form, weight, moment, ranges)
    if start == "nearest":
        return form.decode(form.encode(weight, grid=grid)), grid
    found = round_with_feedback(weight, Inputs.of(moment), form, grid)
    return found.weight, found.grid


class _Trainer:
    """One block with what it reads and should give, batch by batch."""

    def __init__(
        self, program: Program, block: Block, stream: Stream, original: Stream, ctx: PassContext
    ) -> None:
        self._program, self._block, self._ctx = program, block, ctx
        read = {node: stream.values(node) for node in block.inputs}
        self._inputs = [
            {node: values[at] for node, values in read.items()} for at in range(stream.batches)
        ]
        wanted = [original.values(node) for node in block.outputs]
        self._targets = [[values[at] for values in wanted] for at in range(stream.batches)]

    def train(
        self, form: IntBlocks, schedule: Schedule, make: Make
    ) -> tuple[float, dict[Layer, tuple[Tensor, Grid]]]:
        """The share of the starting error that is left, and each layer's weight and grid."""
        program, ctx = self._program, self._ctx
        weights = {layer: program.weight(layer.weight) for layer in self._block.layers}
        moments = input_moments(program, self._block, self._inputs, _by_call(weights))
        for layer, moment in moments.items():
            if not bool(moment.isfinite().all()):
                raise InputError(
                    f"the squares of what {layer.path!r} reads overflow on calibration data: they "
                    "hold NaN or infinity",
                    code="non-finite-activation",
                    site=layer.source or None,
                    hint="run the model on this data and look for the layer that overflows",
                )
        parts = {
            layer: make(layer, weight, form, moments[layer]) for layer, weight in weights.items()
        }
        start = {layer: part.final() for layer, part in parts.items()}
        first = self._error(_decoded(form, start))
        if not first > 0:
            return 1.0, start
        groups = [group for part in parts.values() for group in part.parameters()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        rates = [group["lr"] for group in optimizer.param_groups]
        random = torch.Generator().manual_seed(ctx.seed)
        order: list[int] = []
        for step in range(schedule.steps):
            ctx.check_time(f"training {self._block.path}")
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
        end = {layer: part.final() for layer, part in parts.items()}
        left = self._error(_decoded(form, end)) / first
        return (left, end) if left < 1 else (1.0, start)

    def _loss(self, at: int, weights: dict[fx.Node, Tensor]) -> Tensor:
        """Squared error of a batch's outputs, each as a share of that output's power."""
        found = run_block(self._program, self._block, self._inputs[at], weights)
        total = torch.zeros(())
        for value, target in zip(found, self._targets[at], strict=True):
            power = target.float().square().mean().clamp(min=1e-30)
            total = total + (value.float() - target.float()).square().mean() / power
        return total

    @torch.no_grad()
    def _error(self, weights: dict[Layer, Tensor]) -> float:
        calls = _by_call(weights)
        losses = [float(self._loss(at, calls)) for at in range(len(self._inputs))]
        return sum(losses) / len(losses)


def _decay(progress: float) -> float:
    """A cosine from 1 to 1/20."""
    wave = float(torch.cos(torch.tensor(progress * torch.pi)))
    return 0.05 + 0.95 * 0.5 * (1 + wave)


def _decoded(form: GridFormat, found: dict[Layer, tuple[Tensor, Grid]]) -> dict[Layer, Tensor]:
    return {
        layer: form.decode(form.encode(weight, grid=grid))
        for layer, (weight, grid) in found.items()
    }


def _by_call(weights: dict[Layer, Tensor]) -> dict[fx.Node, Tensor]:
    return {call: weight for layer, weight in weights.items() for call in layer.calls}
