"""Round the weights of linear layers so that columns make up for each other's errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mopt.formats import Encoded, GridFormat
from mopt.formats.int_blocks import IntBlocks
from mopt.layers import Layer
from mopt.machine import trim_heap
from mopt.pass_base import (
    NEEDS_DATA,
    Numerics,
    Pass,
    PassContext,
    PassResult,
    option,
    register_pass,
)
from mopt.passes.quantize._calibrated import encode_on_data, grid_for
from mopt.passes.quantize._gptq import Inputs, round_with_feedback
from mopt.passes.quantize._weights import is_small, kernel_notice
from mopt.program import Program


@register_pass("quantize-gptq", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class QuantizeGptq(Pass):
    """Round weights to few bits so that later columns make up for the errors of earlier ones.

    ## When to use
    For 3- and 4-bit weights, when text or other inputs like those the model will meet are at hand:
    a few thousand rows per layer (tokens) are enough, one batch works.

    ## Accuracy
    GPTQ with static groups, then `refinements` rounds of fitting the scales and moving single
    codes, each of which lowers the error of the layer's output on the calibration data further;
    `refinements = 0` is plain GPTQ. A layer is rounded for the inputs that the rounded layers
    before it give; with `aim = "original"` it aims at what the original layer gave for its own
    inputs, and so makes up for errors of the layers before it (GPTAQ). The statistics
    `output_error` say, per layer, how large the error of its output is, as a share of the output's
    own power.

    ## Limits
    Linear layers only. Where the second moment of the inputs cannot be factored, the damping is
    raised tenfold up to 0.1; where that is not enough the layer is rounded to nearest; both are
    said in the statistics. Time grows with the cube of a layer's in_features. Between layers, only
    the values that the rest of the model still needs are kept, for all batches;
    `aim = "original"` keeps them twice. 3 bits are stored in 4: there is no faster kernel for them.
    2 and 8 bits with `activations = "float"` only make the file smaller: no kernel reads them.

    ## Example
    Four-bit weights in groups of 128 that lose less than half of what rounding to nearest loses.
    """

    bits: int = option(4, choices=(2, 3, 4, 8), help="bits per weight")
    group: int = option(
        32, choices=(0, 16, 32, 64, 128), help="weights that share a scale; 0: a whole row"
    )
    symmetric: bool = option(True, help="no zero points: fewer bytes, a little more error")
    ranges: str = option(
        "output", choices=("output", "mse", "min-max"),
        help="what scales minimize at first: the output's error, the weight's, or clipping",
    )  # fmt: skip
    order: str = option(
        "activation", choices=("activation", "plain"),
        help="columns with the largest inputs first, or from left to right",
    )  # fmt: skip
    aim: str = option(
        "original", choices=("original", "layer"),
        help="whose outputs count: those of the original model, or of the layer on the new inputs",
    )  # fmt: skip
    damping: float = option(0.01, min=0, max=0.1, help="added to the second moment's diagonal")
    refinements: int = option(2, min=0, max=20, help="rounds of fitting scales and moving codes")
    activations: str = option(
        "int8", choices=("int8", "float"), help="whether a kernel may round the input to 8 bits"
    )
    min_size: int = option(4096, min=0, help="leave layers with fewer weights alone")

    def notice(self, backend: str) -> str | None:
        return kernel_notice(self.form, backend)

    @property
    def form(self) -> IntBlocks:
        """The format that the options describe."""
        return IntBlocks(self.bits, self.group, not self.symmetric, self.activations)

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        wanted = self.form

        def choose(layer: Layer, weight: Tensor) -> GridFormat | str:
            if layer.kind != "linear":
                return f"only linear layers have a kernel for weights in groups, not {layer.kind}s"
            return is_small(layer, self.min_size) or wanted

        return encode_on_data(
            self, program, ctx, ("linear", "convolution", "embedding"), choose, _Encoder(self),
            aim_at_original=self.aim == "original",
        )  # fmt: skip


class _Encoder:
    """Encodes layers one after another; those that read the same values share their factor."""

    def __init__(self, options: QuantizeGptq) -> None:
        self._options = options
        self._known: tuple[Tensor, Inputs] | None = None

    def __call__(
        self, layer: Layer, weight: Tensor, form: GridFormat, moment: Tensor
    ) -> tuple[Encoded, Mapping[str, Any]]:
        options = self._options
        if self._known is None or self._known[0] is not moment:
            by_activation = options.order == "activation"
            self._known = None  # before the next factor is made
            inputs = Inputs.of(moment, damping=options.damping, by_activation=by_activation)
            self._known = moment, inputs
            trim_heap()
        grid = grid_for(form, weight, moment, options.ranges)
        rounded = round_with_feedback(
            weight, self._known[1], form, grid, refinements=options.refinements
        )
        remarks: dict[str, Any] = {}
        if rounded.damping is None:
            remarks["rounded"] = "to nearest: no damping up to 0.1 made the second moment regular"
        elif rounded.damping > options.damping:
            remarks["damping"] = rounded.damping
        return form.encode(rounded.weight.to(weight.dtype), grid=rounded.grid), remarks
