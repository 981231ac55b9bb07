"""Replace convolutions by two or three thinner ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from mopt.cost import CostModel, LayerRequest, cost_model
from mopt.device import find_device
from mopt.effects import argument
from mopt.errors import UsageError
from mopt.flops import shape_of
from mopt.layer_request import layer_request, milliseconds, preferred_multiple
from mopt.layers import Layer, find_layers
from mopt.pass_base import (
    NEEDS_DATA,
    Numerics,
    Pass,
    PassContext,
    PassResult,
    Skip,
    option,
    register_pass,
)
from mopt.passes.factorize._layers import count_readers, whole_reason
from mopt.passes.factorize._moments import input_moments, layer_input
from mopt.program import Program
from mopt.rank_choice import Option, pick
from mopt.refit import refit
from mopt.tucker import Tucker, decompose_kernel

_aten = torch.ops.aten
_PLAIN = {3: _aten.conv1d.default, 4: _aten.conv2d.default, 5: _aten.conv3d.default}
# Most components tried along an axis.
_GRID = 16

Ranks = tuple[int, int]


@register_pass("factorize-convolutions", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class FactorizeConvolutions(Pass):
    """Replace convolutions by two or three thinner ones (Tucker-2, low rank).

    ## When to use
    For convolutions with windows over many channels: from 128 channels on three thin ones are often
    faster than one. Some data, and training afterwards, keep much of the quality.

    ## Accuracy
    A window becomes a convolution of one place to few channels, the window on those, and one of one
    place back (Tucker-2); a convolution of one place becomes two. With calibration data errors are
    weighed by the second moment of the input channels, which for one place is the least output
    error there is; `refit` then fits what the last one gives. Components are shared out over layers
    so that the sum of the relative errors (`predicted_error`) is least for what may stay.

    ## Limits
    Convolutions in one group, not transposed, with two axes of `multiple` channels or more. Where
    the cost model sees no gain in three calls, a layer stays whole. Extra values are held.

    ## Example
    3 x 3 over 256 channels with 96 components each way does 0.22 of the work.
    """

    ratio: float = option(0.4, min=0, max=1, help="share to remove from what these layers take")
    aim: str = option("parameters", choices=("parameters", "latency"), help="what the share is of")
    method: str = option(
        "auto", choices=("auto", "whitened", "plain"),
        help="errors weighed by the inputs, or not; auto: weighed if there is calibration data",
    )  # fmt: skip
    multiple: int = option(0, min=0, help="components come in multiples; 0: as the device prefers")
    refit: bool = option(True, help="fit the last convolutions to the original outputs, with data")
    min_size: int = option(4096, min=0, help="leave layers with fewer weights alone")
    allow_slower: bool = option(False, help="factorize even where it is not estimated faster")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if self.method == "whitened" and ctx.calibration is None:
            return f"method {self.method!r} {NEEDS_DATA}, or use method=plain"
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        if self.ratio == 1:
            raise UsageError(
                "factorize-convolutions: ratio 1 would leave no component to any layer",
                code="empties-layer",
                hint="give a ratio below 1",
            )
        model = ctx.cost_model or cost_model(ctx.device or find_device("host"))
        step = self.multiple or preferred_multiple(model, "convolution")
        layers, skipped = self._layers(program, step)
        if not layers or self.ratio == 0:
            return PassResult(changed=False, stats={"layers": 0}, skipped=skipped)
        moments: Mapping[str, Tensor] = {}
        if self.method != "plain" and ctx.calibration is not None:
            moments = input_moments(program, layers.values(), ctx)
        found: dict[str, Tucker] = {}
        for path, layer in layers.items():
            ctx.progress.step(len(found), len(layers), "layers")
            ctx.check_time(f"factorizing {path}")
            found[path] = decompose_kernel(program.weight(layer.weight), moments.get(path))
        chosen = self._choose(layers, found, step, model, skipped)
        if not chosen:
            return PassResult(changed=False, stats={"layers": 0}, skipped=skipped)
        before, original = program.parameter_count(), program.copy()
        errors = {}
        for path, ranks in chosen.items():
            errors[path] = _place(program, layers[path], found[path], ranks)
        program.refresh()
        stats: dict[str, Any] = {
            "layers": len(chosen),
            "ranks": {path: list(ranks) for path, ranks in chosen.items()},
            "removed_parameters": 1 - program.parameter_count() / before,
            "predicted_error": errors,
            "gain_class": "any",
        }
        if self.refit and ctx.calibration is not None:
            calls = {call.name for path in chosen for call in layers[path].calls}
            stats["refit"] = refit(program, original, {}, ctx, changed=calls)
        return PassResult(changed=True, stats=stats, skipped=skipped)

    def _layers(self, program: Program, step: int) -> tuple[dict[str, Layer], list[Skip]]:
        layers: dict[str, Layer] = {}
        skipped: list[Skip] = []
        readers = count_readers(program)
        for layer in find_layers(program):
            if layer.kind != "convolution" or not self.selects(layer.path):
                continue
            reason = None
            if "transpose" in str(layer.calls[0].target):
                reason = "transposed convolutions are left alone"
            elif any(int(argument(call, "groups")) != 1 for call in layer.calls):
                reason = "its groups read different inputs"
            elif prod(layer.shape) < self.min_size:
                reason = f"it has fewer than min_size {self.min_size} weights"
            elif program.weight(layer.weight).dtype not in (torch.float32, torch.float64):
                reason = "its weight is not float32"
            elif min(layer.shape[:2]) <= step:
                reason = f"{min(layer.shape[:2])} channels have no smaller multiple of {step}"
            reason = reason or whole_reason(layer, readers)
            if reason:
                skipped.append(Skip(layer.path, reason))
            else:
                layers[layer.path] = layer
        return layers, skipped

    def _choose(
        self, layers: Mapping[str, Layer], found: Mapping[str, Tucker], step: int,
        model: CostModel, skipped: list[Skip],
    ) -> dict[str, Ranks]:  # fmt: skip
        """The components of each layer that is factorized; the others are skipped."""
        ranks: dict[str, list[Ranks | None]] = {}
        options: dict[str, list[Option]] = {}
        total = 0.0
        for path, layer in layers.items():
            whole = _cost(layer, None, self.aim, model)
            total += whole
            ranks[path], options[path] = [None], [Option(whole, 0.0)]
            slow = _cost(layer, None, "latency", model)
            for one in _grid(layer.shape, step):
                if not self.allow_slower and _cost(layer, one, "latency", model) >= slow:
                    continue
                cost = _cost(layer, one, self.aim, model)
                if cost < whole:
                    lost = found[path].loss(*one) / max(found[path].size, 1e-300)
                    ranks[path].append(one)
                    options[path].append(Option(cost, lost))
        chosen = {}
        for path, at in pick(options, total * (1 - self.ratio)).items():
            taken = ranks[path][at]
            if taken is not None:
                chosen[path] = taken
            elif len(ranks[path]) == 1:
                why = "thinner convolutions in its place are not estimated to be faster"
                skipped.append(Skip(path, why))
            else:
                skipped.append(Skip(path, "its share of the budget buys the whole layer"))
        return chosen


def _grid(shape: tuple[int, ...], step: int) -> list[Ranks]:
    """Numbers of output and input components worth trying; equal ones for windows of one place."""

    def along(size: int) -> list[int]:
        every = list(range(step, size, step))
        return every[:: -(-len(every) // _GRID)] if every else []

    if prod(shape[2:]) == 1:
        return [(rank, rank) for rank in along(min(shape[:2]))]
    return [(outer, inner) for outer in along(shape[0]) for inner in along(shape[1])]


def _shapes(shape: tuple[int, ...], ranks: Ranks) -> list[tuple[int, ...]]:
    """The shapes of the weights that take a layer's place."""
    ones = (1,) * (len(shape) - 2)
    outer, inner = ranks
    if prod(shape[2:]) == 1:
        return [(inner, shape[1], *ones), (shape[0], outer, *ones)]
    return [(inner, shape[1], *ones), (outer, inner, *shape[2:]), (shape[0], outer, *ones)]


def _cost(layer: Layer, ranks: Ranks | None, aim: str, model: CostModel) -> float:
    """Numbers that are stored, or milliseconds, of a layer whole or with so many components."""
    if aim == "parameters":
        shapes = [layer.shape] if ranks is None else _shapes(layer.shape, ranks)
        return float(sum(prod(shape) for shape in shapes))
    total = 0.0
    for call in layer.calls:
        whole = layer_request(call, layer.shape)
        if ranks is None:
            total += milliseconds(model, whole)
            continue
        read, written = shape_of(layer_input(call).meta["val"]), shape_of(call.meta["val"])
        *inner, last = _shapes(layer.shape, ranks)
        if len(inner) == 2:
            total += milliseconds(model, _pointwise(inner[0], (read[0], *read[2:])))
        total += milliseconds(model, layer_request(call, inner[-1]))
        total += milliseconds(model, _pointwise(last, (written[0], *written[2:])))
    return total


def _pointwise(shape: tuple[int, ...], places: tuple[int, ...]) -> LayerRequest:
    geometry = {"batch": places[0], "output": places[1:], "stride": 1, "groups": 1,
                "transposed": False}  # fmt: skip
    return LayerRequest("convolution", shape, rows=prod(places), geometry=geometry)


def _place(program: Program, layer: Layer, found: Tucker, ranks: Ranks) -> float:
    """Put the thin convolutions in place of a layer's calls; its relative squared error."""
    dtype, name = program.weight(layer.weight).dtype, str(layer.weight.target)
    first, core, last = found.factors(*ranks)
    error = max(1 - float(core.square().sum()) / max(found.size, 1e-300), 0.0)
    ones = (1,) * (len(layer.shape) - 2)
    if prod(layer.shape[2:]) == 1:  # the core is a matrix
        tensors = [core.flatten(1) @ first, last]
    else:
        tensors = [first, core, last]
    tensors = [t if t.dim() > 2 else t.reshape(*t.shape, *ones) for t in tensors]
    stored: list[fx.Node] = []
    for call in layer.calls:
        if not stored:
            stored = [program.add_weight(f"{name}_{at}", tensor.to(dtype).contiguous(), call)
                      for at, tensor in enumerate(tensors)]  # fmt: skip
        plain, value = _PLAIN[len(layer.shape)], call.args[0]
        if len(stored) == 3:
            value = program.insert_call(plain, (value, stored[0]), like=call)
        value = program.insert_call(
            call.target, (value, stored[-2], None, *call.args[3:]), like=call
        )
        # The call keeps its name, which tells later passes what it approximates.
        call.target, call.args = plain, (value, stored[-1], argument(call, "bias"))
    for node in program.nodes:
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
    return error
