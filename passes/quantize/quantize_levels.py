"""Store the weights of linear layers as small floats or other unevenly spaced levels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mopt.formats import Format, find_format
from mopt.formats.level_blocks import LevelBlocks
from mopt.layers import Layer
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, option, register_pass
from mopt.passes.quantize._weights import (
    encode_layers,
    is_small,
    kernel_notice,
    relative_error,
)
from mopt.program import Program


@register_pass("quantize-levels", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class QuantizeLevels(Pass):
    """Store the weights of linear layers as small floats or other unevenly spaced levels.

    ## When to use
    To make a file small, or to see what a format of other hardware would cost in quality. Only
    `bitmod3` becomes faster on a CPU; the other formats have no kernel there: they are widened when
    the model is loaded, so speed and memory are those of float layers.

    ## Accuracy
    Each weight becomes the nearest level times the scale of its group. On normally distributed
    weights the squared error, with the default `ranges = "mse"`, in percent of the weight's: nvfp4
    0.71 (4.5 bits per weight), nf4 0.73 (4.5), bitmod4 0.86 (4.27), mxfp4 1.24 (4.25), bitmod3 3.3
    (stored in 4.25), twinlog4 1.23 (4.27), fp8-e4m3 0.07 and fp8-e5m2 0.26 (8). Integers of 4 bits
    in groups of 64 that were searched the same way are as good as nf4, and have a kernel. On
    weights with heavy tails (Student's t with 4 degrees of freedom, groups of 128) twinlog4 has
    1.42, bitmod4 1.15, 4-bit integers 1.9 to 2.4. `otherwise` names a second format, which a layer
    gets where its squared error is smaller.

    ## Limits
    Linear layers in float32. Layers whose input is much shorter than a group are left alone.

    ## Example
    A linear of 384 x 384 in float32 (590 kB) becomes 83 kB in nf4.
    """

    format: str = option("nf4", choices=LevelBlocks.names(), help="which levels, and their groups")
    otherwise: str = option(
        "", choices=("", *LevelBlocks.names()), help="a second format, for layers it suits better"
    )
    ranges: str = option("mse", choices=("mse", "min-max"), help="how scales are chosen")
    min_size: int = option(4096, min=0, help="leave layers with fewer weights alone")

    def notice(self, backend: str) -> str | None:
        return kernel_notice(find_format(self.format), backend)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        wanted = find_format(self.format)

        def choose(layer: Layer, weight: Tensor) -> Format | str:
            if layer.kind != "linear":
                return f"{self.format} is for linear layers, not {layer.kind}s"
            reason = is_small(layer, self.min_size)
            if reason or not self.otherwise:
                return reason or wanted
            both = (wanted, find_format(self.otherwise))
            fitting = [one for one in both if one.check(layer, weight) is None] or [wanted]
            return min(fitting, key=lambda one: _error(one, weight, self.ranges))

        kinds = ("linear", "convolution", "embedding")
        return encode_layers(self, program, ctx, kinds, choose, self.ranges)


def _error(form: Format, weight: Tensor, ranges: str) -> float:
    assert isinstance(form, LevelBlocks)
    grid = form.grid(weight, ranges=ranges)
    return relative_error(weight, form.decode(form.encode(weight, grid=grid)))
