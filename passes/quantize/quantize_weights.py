"""Round the weights of linear layers to 2, 4 or 8 bits in groups."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mopt.errors import UsageError
from mopt.formats import Encoded, Format, GridFormat
from mopt.formats.half import Half
from mopt.formats.int_blocks import IntBlocks
from mopt.layers import Layer, find_layers, is_returned
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
from mopt.passes.quantize._weights import encode_layers, is_small, kernel_notice
from mopt.program import Program

_HALF_BITS = 16
# Beyond this share of the weights a head is worth its kernel: vocabularies, not classes.
_SMALL_HEAD = 0.1


@register_pass("quantize-weights", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Round the weights of linear layers to 2, 4 or 8 bits in groups.

    ## When to use
    For models whose time goes into reading weights: generating text one token at a time, small
    batches. No data is needed, except for `ranges = "output"`.

    ## Accuracy
    Round to nearest. On weights that look normally distributed the squared error is 0.65 percent
    of the weight's at 4 bits in groups of 32, and below 0.004 percent at 8 bits. `ranges = "mse"`
    picks each group's scale for the least squared error; "min-max" covers the largest weight;
    "output" picks it for the least error of the layer's output on calibration data, which is the
    clipping of AWQ, and does so for the inputs that the rounded layers before it give.
    With `activations = "int8"` the kernel also rounds each row and block of the input to 8 bits
    (about half a percent), which is what makes it fast; "float" keeps the input as it is.

    ## Limits
    Linear layers only. 2- and 8-bit weights with `activations = "float"` only make the file
    smaller: no fast kernel reads them, so they are widened when the model is loaded. Layers whose
    input is much shorter than a group are left alone, because padding would take the gain.
    Errors of the last layer go straight into what the model returns: `head_bits = 8` keeps the
    layers whose result is returned at 8 bits, `head_bits = 16` keeps small ones in float16.

    ## Example
    A linear of 384 x 384 in float32 (590 kB) becomes 92 kB at 4 bits in groups of 32.
    """

    bits: int = option(4, choices=(2, 3, 4, 8), help="bits per weight")
    group: int = option(
        32, choices=(0, 16, 32, 64, 128), help="weights that share a scale; 0: a whole row"
    )
    symmetric: bool = option(True, help="no zero points: fewer bytes, a little more error")
    ranges: str = option(
        "mse", choices=("output", "mse", "min-max"), help="what scales minimize, see Accuracy"
    )
    activations: str = option(
        "int8", choices=("int8", "float"), help="whether a kernel may round the input to 8 bits"
    )
    head_bits: int = option(
        0,
        choices=(0, 4, 8, 16),
        help="bits of the layers whose result the model returns; 0: as bits; 16: float16 where "
        "they are under a tenth of the weights, else as bits; tables are left to other passes",
    )
    min_size: int = option(4096, min=0, help="leave layers with fewer weights alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_bits == _HALF_BITS and self.ranges == "output":
            raise UsageError(
                "quantize-weights: head_bits=16 and ranges='output', which has no ranges to choose "
                "for floats",
                code="bad-option",
                hint="use ranges='mse', or head_bits=8",
            )

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if self.ranges == "output" and ctx.calibration is None:
            return f"ranges='output' {NEEDS_DATA}, or use ranges='mse'"
        return None

    def notice(self, backend: str) -> str | None:
        return kernel_notice(self._form, backend) or kernel_notice(self._of_heads, backend)

    @property
    def _form(self) -> IntBlocks:
        return IntBlocks(self.bits, self.group, not self.symmetric, self.activations)

    @property
    def _of_heads(self) -> IntBlocks:
        in_half = self.head_bits == _HALF_BITS
        return replace(self._form, width=(0 if in_half else self.head_bits) or self.bits)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        wanted, of_heads = self._form, self._of_heads
        in_half = self.head_bits == _HALF_BITS
        small = _SMALL_HEAD * program.original_size().bytes

        tables = {layer.weight.target for layer in find_layers(program)
                  if layer.kind == "embedding"}  # fmt: skip

        def in_blocks(layer: Layer, weight: Tensor) -> IntBlocks | str:
            if layer.kind != "linear":
                return f"only linear layers have a kernel for weights in groups, not {layer.kind}s"
            return is_small(layer, self.min_size) or (of_heads if _is_head(layer) else wanted)

        def choose(layer: Layer, weight: Tensor) -> Format | str:
            if layer.kind != "linear" or not (in_half and _is_head(layer)):
                return in_blocks(layer, weight)
            if layer.weight.target in tables:
                return "its weight is also a table: a pass that stores tables stores both as one"
            if weight.nbytes < small and not Half().range_reason(weight):
                return is_small(layer, self.min_size) or Half()
            return in_blocks(layer, weight)

        kinds = ("linear", "convolution", "embedding")
        if self.ranges == "output":
            return encode_on_data(self, program, ctx, kinds, in_blocks, _encode)
        return encode_layers(self, program, ctx, kinds, choose, self.ranges)


def _is_head(layer: Layer) -> bool:
    return any(is_returned(call) for call in layer.calls)


def _encode(
    layer: Layer, weight: Tensor, form: GridFormat, moment: Tensor
) -> tuple[Encoded, dict[str, object]]:
    return form.encode(weight, grid=grid_for(form, weight, moment, "output")), {}
