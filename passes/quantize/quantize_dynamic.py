"""Compute linear layers in int8, with the range of the input found at run time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mopt.formats import Format
from mopt.formats.int_rows import Int8Dynamic
from mopt.layers import Layer
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, option, register_pass
from mopt.passes.quantize._weights import encode_layers, is_small
from mopt.program import Program


@register_pass("quantize-dynamic", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class QuantizeDynamic(Pass):
    """Compute linear layers in int8, with the range of the input found at run time.

    ## When to use
    Transformers on a CPU, when many tokens are computed at once. No data is needed.

    ## Accuracy
    Weights are symmetric int8 with a scale per output channel. The input of each call is rounded
    to 8 bits over one range for the whole tensor, so rows of a batch influence each other: one
    row with values fifty times larger costs the others most of their precision.

    ## Limits
    Linear layers in float32 only. On x86 processors without VNNI set `reduce_range`, which keeps
    weight codes within [-64, 64]; otherwise sums may saturate there.

    ## Example
    A linear of 384 x 384 in float32 (590 kB) becomes 149 kB and runs two to four times faster.
    """

    ranges: str = option("mse", choices=("mse", "min-max"), help="how weight scales are chosen")
    reduce_range: bool = option(False, help="7-bit weights, for x86 processors without VNNI")
    min_size: int = option(4096, min=0, help="leave layers with fewer weights alone")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        wanted = Int8Dynamic(reduced=self.reduce_range)

        def choose(layer: Layer, weight: Tensor) -> Format | str:
            if layer.kind == "convolution":
                return "convolutions have no fast kernel with run-time ranges; calibrate instead"
            return is_small(layer, self.min_size) or wanted

        kinds = ("linear", "convolution")
        return encode_layers(self, program, ctx, kinds, choose, self.ranges)
