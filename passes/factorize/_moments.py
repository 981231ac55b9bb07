"""What the passes of this family ask of calibration data."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from mopt.layers import LINEAR, Layer
from mopt.moments import ChannelMoments
from mopt.pass_base import PassContext
from mopt.program import Program

# Rows of one batch that a second moment is taken over, for convolutions: neighbours are alike.
_MOST_ROWS = 4096


def layer_input(call: fx.Node) -> fx.Node:
    """What a linear layer or convolution reads."""
    source = call.args[0]
    assert isinstance(source, fx.Node)
    return source


def input_moments(program: Program, layers: Iterable[Layer], ctx: PassContext) -> dict[str, Tensor]:
    """The mean of x x^T over the channels each layer reads, on calibration data, by path."""
    assert ctx.calibration is not None
    layers = list(layers)
    moments: dict[fx.Node, ChannelMoments] = {}
    for layer in layers:
        for call in layer.calls:
            plain = call.target in LINEAR
            made = ChannelMoments() if plain else ChannelMoments(1, _MOST_ROWS)
            moments.setdefault(layer_input(call), made)
    ctx.calibration.for_part(program).collect(moments, ctx)
    found = {}
    for layer in layers:
        sources = [moments[layer_input(call)].second for call in layer.calls]
        found[layer.path] = sum(sources[1:], sources[0]) / len(sources)
    return found
