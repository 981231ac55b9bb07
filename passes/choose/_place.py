"""Putting formats into a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mopt.formats import GridFormat, find_format
from mopt.formats.base import require_finite
from mopt.layers import find_layers
from mopt.pass_base import PassContext
from mopt.passes.choose._options import STATIC
from mopt.program import Program
from mopt.registry import make_pass


def place(program: Program, formats: Mapping[str, str], ctx: PassContext) -> None:
    """Encode the layers named in ``formats`` (path: format), rounding to nearest.

    Layers with 8-bit values between them need the ranges of those values, found on calibration
    data; they are placed together, last, so that their neighbours are as they will be.
    """
    static = [path for path, name in formats.items() if name in STATIC]
    for layer in find_layers(program):
        name = formats.get(layer.path)
        if name is None or name in STATIC:
            continue
        weight = program.weight(layer.weight)
        require_finite(weight, layer.path, layer.source)
        format_ = find_format(name)
        grid = format_.grid(weight, ranges="mse") if isinstance(format_, GridFormat) else None
        format_.place(program, layer, format_.encode(weight, grid=grid))
    if static:
        # Found by name: families do not import each other, and this one is a whole algorithm.
        options = {"layers": ",".join(_literal(path) for path in static),
                   "reduce_range": formats[static[0]].endswith("reduced")}  # fmt: skip
        program.refresh()
        make_pass("quantize-static", options).run(program, replace(ctx, observations=()))


def _literal(path: str) -> str:
    """A glob that matches exactly ``path``."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in path)
