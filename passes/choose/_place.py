"""Putting formats into a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mopt.formats import GridFormat, find_format
from mopt.formats.base import require_finite
from mopt.formats.int_blocks import IntBlocks
from mopt.formats.low_rank import LowRank
from mopt.layers import find_layers
from mopt.pass_base import PassContext
from mopt.passes.choose._options import STATIC
from mopt.program import Program
from mopt.registry import make_pass


def place(
    program: Program, formats: Mapping[str, str], ctx: PassContext, *, fitted: bool = False
) -> None:
    """Encode the layers named in ``formats`` (path: format), rounding to nearest.

    ``fitted`` rounds weights in blocks so that columns make up for each other's errors on the
    calibration data. Layers with 8-bit values between them need the ranges of those values, found
    on calibration data; they are placed together, last, so that their neighbours are as they will
    be.
    """
    static = [path for path, name in formats.items() if name in STATIC]
    left = {path: name for path, name in formats.items() if name not in STATIC}
    if fitted:
        for name in dict.fromkeys(filter(is_fitted, left.values())):
            _place_fitted(program, [p for p, n in left.items() if n == name], name, ctx)
        left = {path: name for path, name in left.items() if not is_fitted(name)}
    for layer in find_layers(program):
        if layer.path not in left:
            continue
        name = left[layer.path]
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


def is_fitted(name: str) -> bool:
    """Whether a format's codes or factors can be fitted to calibration data."""
    return isinstance(find_format(name), IntBlocks | LowRank)


def _place_fitted(program: Program, paths: list[str], name: str, ctx: PassContext) -> None:
    form = find_format(name)
    options: dict[str, Any] = {"layers": ",".join(map(_literal, paths)), "min_size": 0}
    algorithm = "quantize-gptq"
    if isinstance(form, LowRank):
        algorithm = "factorize-linears"
        options |= {"ratio": 1 - form.percent / 100, "ranks": "uniform", "allow_slower": True}
    else:
        assert isinstance(form, IntBlocks)
        options |= {
            "bits": form.width, "group": form.group, "symmetric": not form.asymmetric,
            "activations": form.activations,
        }  # fmt: skip
    make_pass(algorithm, options).run(program, replace(ctx, observations=()))
    program.plan.setdefault("formats", {}).update(dict.fromkeys(paths, name))
    program.refresh()


def _literal(path: str) -> str:
    """A glob that matches exactly ``path``."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in path)
