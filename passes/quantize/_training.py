"""Training the rounded weights of one block after another towards the original block's outputs.

:class:`BlockTraining` is the base of the passes that do so; they say how a weight is trained.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopt.formats import Encoded, Grid, GridFormat
from mopt.formats.int_blocks import IntBlocks
from mopt.layers import Layer
from mopt.pass_base import NEEDS_DATA, Pass, PassContext, PassResult, Skip, option
from mopt.passes.quantize._blocks import find_blocks
from mopt.passes.quantize._calibrated import choose_formats, grid_for
from mopt.passes.quantize._gptq import Inputs, round_with_feedback
from mopt.passes.quantize._trainers import Make, Schedule, Trainable, trainer_of
from mopt.passes.quantize._weights import encoding_error, is_small, kernel_notice
from mopt.program import Program
from mopt.streaming import Stream


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
    encoded: dict[Layer, Encoded] = {}
    stats: dict[str, Any] = {"layers": 0, "formats": {}, "weight_error": {}, "error_kept": {}}
    blocks = find_blocks(program, layers, whole=whole)
    for index, block in enumerate(blocks):
        ctx.progress.step(index, len(blocks), "blocks")
        if not block.outputs:
            skipped.append(Skip(block.path, "nothing that the model returns depends on it"))
            continue
        stream.advance(block.nodes[0])
        trainer = trainer_of(program, block, stream, original, ctx)
        kept, found = trainer.train(form, schedule, make)
        for layer, one_encoded in found.items():
            encoded[layer] = one_encoded
            if block is not blocks[-1]:
                decoded = form.decode(one_encoded)
                stream.replace_weight(layer.calls, layer.weight, decoded)
            stats["formats"][layer.path] = form.name
            weight = program.weight(layer.weight)
            stats["weight_error"][layer.path] = encoding_error(form, weight, one_encoded)
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
