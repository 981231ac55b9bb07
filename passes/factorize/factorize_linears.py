"""Replace the matrices of linear layers by products of two thin ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mopt.cost import CostModel, cost_model
from mopt.device import find_device
from mopt.errors import UsageError
from mopt.formats.low_rank import place_factors
from mopt.layer_request import layer_request, milliseconds
from mopt.layers import Layer, find_layers
from mopt.low_rank import Decomposition, allocate, break_even, decompose, uniform_rank
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
from mopt.passes.factorize._moments import input_moments
from mopt.program import Program
from mopt.rank_choice import Option, pick
from mopt.refit import refit
from mopt.trainable import squared_gradients

# Of the break-even rank, the smallest that is tried, and how many ranks of a layer are timed.
_FLOOR = 0.1
_MOST_RANKS = 32


@register_pass("factorize-linears", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class FactorizeLinears(Pass):
    """Replace matrices of linear layers by products of two thin ones (low rank).

    ## When to use
    To take some tens of percent off the parameters of a language model without training. On data
    like the model's own, `whitened` is the method to use; `plain` needs no data and is far worse.

    ## Accuracy
    `whitened` gives every layer the least error of its output that its rank allows on the
    calibration data, and says beforehand how large it is (`predicted_error`). Ranks are shared out
    so that the sum of the relative errors is least for the parameters that may stay. With `refit`
    layers are then fitted to the outputs of the original, on what the factorized layers before
    them give.

    ## Limits
    Two thin layers instead of one: a rank must be clearly below the break-even to be faster, and a
    layer for which the cost model of the device sees no gain stays whole. Heads of the model and
    shared weights stay whole.

    ## Example
    A 512 x 512 layer at rank 128 holds half of the parameters.
    """

    ratio: float = option(0.2, min=0, max=1, help="share to remove of what the layers take")
    aim: str = option("parameters", choices=("parameters", "latency"), help="what the share is of")
    method: str = option(
        "whitened", choices=("whitened", "activation", "fisher", "plain"),
        help="what errors are weighed by: second moments, sizes of inputs, gradients, nothing",
    )  # fmt: skip
    alpha: float = option(0.5, min=0, max=1, help="power of the inputs' sizes, for activation")
    ranks: str = option(
        "allocated", choices=("allocated", "uniform"),
        help="least total loss for the parameters, or the same share of every layer",
    )  # fmt: skip
    multiple: int = option(8, min=1, help="ranks are multiples of this")
    refit: bool = option(False, help="fit the factors on what earlier ones give, with data")
    min_size: int = option(4096, min=0, help="leave layers with fewer weights alone")
    allow_slower: bool = option(False, help="factorize even where it is not estimated faster")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if self.method != "plain" and ctx.calibration is None:
            return f"method {self.method!r} {NEEDS_DATA}, or use method=plain"
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        if self.ratio == 1:
            raise UsageError(
                "factorize-linears: ratio 1 would leave no rank to any layer",
                code="empties-layer",
                hint="give a ratio below 1",
            )
        layers, skipped = self._layers(program)
        if not layers or self.ratio == 0:
            return PassResult(changed=False, stats={"layers": 0}, skipped=skipped)
        found = self._decompositions(program, layers, ctx)
        model = ctx.cost_model or cost_model(ctx.device or find_device("host"))
        ranks = self._ranks(layers, found, model)
        chosen: dict[str, int] = {}
        for layer in layers.values():
            rank = ranks[layer.path]
            reason: str | None = f"its share of the {self.aim} buys the whole matrix"
            if rank is not None:
                reason = None if self.allow_slower else _not_faster(layer, rank, model)
            if rank is None or reason is not None:
                skipped.append(Skip(layer.path, reason or ""))
            else:
                chosen[layer.path] = rank
        if not chosen:
            return PassResult(changed=False, stats={"layers": 0}, skipped=skipped)
        before = program.parameter_count()
        original = program.copy()
        for path, rank in chosen.items():
            place_factors(program, layers[path], *found[path].factors(rank))
        program.refresh()
        size = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
        stats: dict[str, Any] = {
            "layers": len(chosen),
            "ranks": chosen,
            "removed_parameters": 1 - program.parameter_count() / before,
            "removed_of_layers": (before - program.parameter_count()) / size,
            "predicted_error": {
                path: found[path].loss(rank) / max(found[path].loss(0), 1e-300)
                for path, rank in chosen.items()
            },
            "gain_class": "any",
        }
        if self.refit and ctx.calibration is not None:
            calls = {call.name for path in chosen for call in layers[path].calls}
            stats["refit"] = refit(program, original, {}, ctx, changed=calls)
        return PassResult(changed=True, stats=stats, skipped=skipped)

    def _layers(self, program: Program) -> tuple[dict[str, Layer], list[Skip]]:
        layers: dict[str, Layer] = {}
        skipped: list[Skip] = []
        readers = count_readers(program)
        for layer in find_layers(program):
            if layer.kind != "linear" or not self.selects(layer.path):
                continue
            reason = whole_reason(layer, readers)
            if layer.shape[0] * layer.shape[1] < self.min_size:
                reason = f"it has fewer than min_size {self.min_size} weights"
            elif program.weight(layer.weight).dtype not in (torch.float32, torch.float64):
                reason = "its weight is not float32"
            elif break_even(layer.shape) < self.multiple:
                reason = f"a rank of {self.multiple} holds no fewer parameters than the matrix"
            if reason:
                skipped.append(Skip(layer.path, reason))
            else:
                layers[layer.path] = layer
        return layers, skipped

    def _decompositions(
        self, program: Program, layers: Mapping[str, Layer], ctx: PassContext
    ) -> dict[str, Decomposition]:
        moments: Mapping[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        if self.method in ("whitened", "activation"):
            moments = input_moments(program, layers.values(), ctx)
        elif self.method == "fisher":
            gradients = squared_gradients(program, ctx, [x.weight for x in layers.values()])
        result: dict[str, Decomposition] = {}
        for layer in layers.values():
            ctx.progress.step(len(result), len(layers), "layers")
            ctx.check_time(f"factorizing {layer.path}")
            weigh = None
            if moments:
                weigh = moments[layer.path]
                if self.method == "activation":
                    weigh = weigh.diagonal().sqrt().pow(self.alpha)
            elif gradients:
                # One weight per input: the Fisher information summed over outputs (FWSVD).
                fisher = gradients[str(layer.weight.target)].double().sum(0)
                weigh = (fisher / fisher.max().clamp(min=1e-30) + 1e-5).sqrt()
            result[layer.path] = decompose(program.weight(layer.weight), weigh)
        return result

    def _ranks(
        self, layers: Mapping[str, Layer], found: Mapping[str, Decomposition], model: CostModel
    ) -> dict[str, int | None]:
        shapes = {path: (layer.shape[0], layer.shape[1]) for path, layer in layers.items()}
        if self.ranks == "uniform":
            return {path: uniform_rank(shape, self.ratio, self.multiple)
                    for path, shape in shapes.items()}  # fmt: skip
        if self.aim == "latency":
            return self._timed_ranks(layers, found, model)
        size = sum(outputs * inputs for outputs, inputs in shapes.values())
        budget = int(size * (1 - self.ratio))
        weights = {path: 1 / max(one.loss(0), 1e-300) for path, one in found.items()}
        return allocate(found, shapes, budget, weights=weights, step=self.multiple)

    def _timed_ranks(
        self, layers: Mapping[str, Layer], found: Mapping[str, Decomposition], model: CostModel
    ) -> dict[str, int | None]:
        """The ranks with the least loss for which all layers take at most their share of time."""
        ranks: dict[str, list[int | None]] = {}
        options: dict[str, list[Option]] = {}
        total = 0.0
        for path, layer in layers.items():
            whole = _time(layer, None, model)
            total += whole
            least = max(int(_FLOOR * break_even(layer.shape)), self.multiple)
            every = range(least // self.multiple * self.multiple, break_even(layer.shape) + 1)
            tried = every[:: self.multiple][:: -(-len(every) // (self.multiple * _MOST_RANKS))]
            size = max(found[path].loss(0), 1e-300)
            ranks[path] = [None, *tried]
            options[path] = [Option(whole, 0.0)] + [
                Option(_time(layer, rank, model), found[path].loss(rank) / size) for rank in tried
            ]
        chosen = pick(options, total * (1 - self.ratio))
        spent = sum(options[path][at].cost for path, at in chosen.items())
        if spent > total * (1 - self.ratio) and not self.allow_slower:
            raise UsageError(
                f"factorize-linears: no ranks take {self.ratio:g} of the estimated time away, at "
                f"most {1 - spent / total:.2g}",
                code="empties-layer",
                hint="lower ratio, or use aim=parameters",
            )
        return {path: ranks[path][at] for path, at in chosen.items()}


def _time(layer: Layer, rank: int | None, model: CostModel) -> float:
    """Estimated milliseconds of all calls of a layer, whole or as two."""
    outputs, inputs = layer.shape
    total = 0.0
    for call in layer.calls:
        request = layer_request(call, layer.shape)
        shapes: list[tuple[int, ...]] = [layer.shape]
        if rank is not None:
            shapes = [(rank, inputs), (outputs, rank)]
        for shape in shapes:
            total += milliseconds(model, replace(request, shape=shape))
    return total


def _not_faster(layer: Layer, rank: int, model: CostModel) -> str | None:
    if _time(layer, rank, model) < _time(layer, None, model):
        return None
    return f"two layers of rank {rank} are not estimated to be faster than one"
