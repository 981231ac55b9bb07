"""Store weights in 8 bits and compute in 32."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mopt.formats import Format, find_format
from mopt.layers import Layer, find_layers
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, option, register_pass
from mopt.passes.quantize._weights import encode_layers, is_small
from mopt.program import Program


@register_pass("store-int8", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class StoreInt8(Pass):
    """Store weights in 8 bits and compute in 32.

    ## When to use
    For layers that integer kernels would make slower, convolutions without static ranges above
    all: the file shrinks to a quarter, speed stays, and so does memory once the model is loaded.

    ## Accuracy
    Codes of 8 bits with a scale per output channel, rounded to nearest; inputs are not rounded.
    Less is lost than where activations are rounded too.

    ## Limits
    float32 weights of linear layers and convolutions. The runtime widens them when it loads the
    model, which takes up to three times the float weights for a moment.

    ## Example
    A convolution of 256 x 256 x 3 x 3 takes 591 kB instead of 2.36 MB.
    """

    kinds: str = option("all", choices=("all", "convolutions"), help="which weights")
    ranges: str = option("mse", choices=("mse", "min-max"), help="how scales are chosen")
    min_size: int = option(1024, min=0, help="leave weights with fewer values alone")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        kinds = ("convolution",) if self.kinds == "convolutions" else ("linear", "convolution")
        stored = find_format("int8-stored")
        tables = {layer.weight.target for layer in find_layers(program)
                  if layer.kind == "embedding"}  # fmt: skip

        def choose(layer: Layer, weight: Tensor) -> Format | str:
            if layer.weight.target in tables:
                return "its weight is also a table, which would be stored a second time"
            return is_small(layer, self.min_size) or stored

        return encode_layers(self, program, ctx, kinds, choose, self.ranges)
