"""Round weights to few bits and keep what that loses as two thin layers."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from mopt.formats.base import require_finite
from mopt.formats.int_blocks import IntBlocks
from mopt.layers import Layer, find_layers
from mopt.low_rank import decompose
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
from mopt.second_order import output_error

_aten = torch.ops.aten
# A group of codes along the rank must be whole, or half of it is padding.
_RANKS = 16


@dataclass(frozen=True)
class Repaired:
    """A weight as codes (decoded here) and a thin product; ``errors`` are the squared errors of
    the output, relative to its power: of the codes alone, and of both."""

    rounded: Tensor
    first: Tensor
    second: Tensor
    errors: tuple[float, float]


@register_pass("repair-rounding", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class RepairRounding(Pass):
    """Round weights to few bits and keep what that loses as two thin layers (LQER).

    ## When to use
    Where 4 bits and fewer lose too much and single layers may take a little more time: two thin
    layers beside the rounded one win back a part of its error, most where errors gather in few
    directions. At 8 bits there is nothing to win.

    ## Accuracy
    The error of rounding is decomposed with the second moment of the layer's inputs as weight, so
    that `rank` directions take away as much of the output's error as they can (LQER, Zhang et al.
    2024, with whitening in place of a scale per channel). Each further one of `rounds` rounds what
    the thin product leaves, and the best is kept (LoftQ, Li et al. 2023). Without data all inputs
    count alike. `output_error` says per layer what is lost without and with the repair.

    ## Limits
    Linear layers; the model's head is left to other passes. Thin layers hold 8 bits per number.
    They are two more kernel calls per layer, `rank * (inputs + outputs)` more products.

    ## Example
    At rank 32 a 1024 x 1024 layer in 4 bits takes 15 % more bytes.
    """

    bits: int = option(4, choices=(2, 3, 4), help="bits per weight of the rounded layer")
    group: int = option(32, choices=(16, 32, 64, 128), help="weights that share a scale")
    rank: int = option(32, min=_RANKS, help="rank of the repair; a multiple of 16")
    rounds: int = option(3, min=1, max=20, help="times that rounding and repair alternate")
    method: str = option(
        "auto", choices=("auto", "whitened", "plain"),
        help="errors weighed by the inputs, or not; auto: weighed if there is calibration data",
    )  # fmt: skip
    min_size: int = option(16384, min=0, help="leave layers with fewer weights alone")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if self.method == "whitened" and ctx.calibration is None:
            return f"method {self.method!r} {NEEDS_DATA}, or use method=plain"
        if self.rank % _RANKS:
            return f"rank {self.rank} is not a multiple of {_RANKS}"
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        form = IntBlocks(self.bits, self.group)
        thin = IntBlocks(8, 32 if self.rank % 32 == 0 else _RANKS)
        layers, skipped = self._layers(program, form, thin)
        moments: Mapping[str, Tensor] = {}
        if layers and self.method != "plain" and ctx.calibration is not None:
            moments = input_moments(program, layers, ctx)
        errors: dict[str, list[float]] = {}
        formats: dict[str, str] = {}
        for layer in layers:
            ctx.progress.step(len(errors), len(layers), "layers")
            ctx.check_time(f"rounding {layer.path}")
            weight = program.weight(layer.weight)
            require_finite(weight, layer.path, layer.source)
            found = repair(weight, form, self.rank, moments.get(layer.path), rounds=self.rounds)
            errors[layer.path] = list(found.errors)
            _place(program, layer, form, thin, found)
            formats[layer.path] = f"{form.name}+rank{self.rank}"
        program.plan["formats"] = {**program.plan.get("formats", {}), **formats}
        program.refresh()
        stats: dict[str, Any] = {"layers": len(layers), "formats": formats, "output_error": errors}
        return PassResult(changed=bool(layers), stats=stats, skipped=skipped)

    def _layers(
        self, program: Program, form: IntBlocks, thin: IntBlocks
    ) -> tuple[list[Layer], list[Skip]]:
        layers, skipped = [], []
        readers = count_readers(program)
        for layer in find_layers(program):
            if layer.kind != "linear" or not self.selects(layer.path):
                continue
            weight = program.weight(layer.weight)
            inputs = replace(layer, shape=(self.rank, layer.shape[1]))
            reason = whole_reason(layer, readers)
            reason = reason or form.check(layer, weight) or thin.check(inputs, weight)
            if prod(layer.shape) < self.min_size:
                reason = f"{prod(layer.shape)} weights are fewer than min_size {self.min_size}"
            elif 2 * self.rank > min(layer.shape):
                reason = f"a rank of {self.rank} is most of its {min(layer.shape)} directions"
            if reason:
                skipped.append(Skip(layer.path, reason))
            else:
                layers.append(layer)
        return layers, skipped


def repair(
    weight: Tensor, form: IntBlocks, rank: int, moment: Tensor | None, *, rounds: int = 1
) -> Repaired:
    """Codes for ``weight`` (m, n) and the best product of that rank for what they lose.

    ``moment`` (n, n) is that of the inputs; None weighs all alike. Alternating does not lower the
    error in every round: the best round is returned.
    """
    w = weight.double()
    even = torch.eye(w.shape[1], dtype=torch.float64, device=w.device)
    seen = even if moment is None else moment.double()
    power = output_error(w, seen) or 1.0
    best: Repaired | None = None
    alone, low = 0.0, torch.zeros_like(w)
    for at in range(rounds):
        target = (w - low).to(weight.dtype)
        rounded = form.decode(form.encode(target, grid=form.grid(target))).double()
        if at == 0:
            alone = output_error(w - rounded, seen) / power
        first, second = decompose(w - rounded, moment).factors(rank)
        low = second @ first
        error = output_error(w - rounded - low, seen) / power
        if best is None or error < best.errors[1]:
            best = Repaired(rounded.to(weight.dtype), first, second, (alone, error))
    assert best is not None
    return best


def _place(
    program: Program, layer: Layer, form: IntBlocks, thin: IntBlocks, found: Repaired
) -> None:
    """Add the thin layers to every call, then let formats replace all three."""
    dtype, name = program.weight(layer.weight).dtype, str(layer.weight.target)
    first_call = layer.calls[0]
    readers = [
        program.add_weight(f"{name}_{part}", tensor.to(dtype).contiguous(), first_call)
        for part, tensor in (("repair_first", found.first), ("repair_second", found.second))
    ]
    calls: list[list[Any]] = [[], []]
    for call in layer.calls:
        with program.graph.inserting_after(call):
            total = program.graph.call_function(_aten.add.Tensor, (call, call))
        call.replace_all_uses_with(total, delete_user_cb=partial(operator.is_not, total))
        inner = program.insert_call(_aten.linear.default, (call.args[0], readers[0]), like=total)
        outer = program.insert_call(_aten.linear.default, (inner, readers[1]), like=total)
        total.args = (call, outer)
        total.meta = {k: call.meta[k] for k in ("nn_module_stack", "stack_trace", "val")
                      if k in call.meta}  # fmt: skip
        for node in (inner, outer):
            node.meta.update({k: v for k, v in total.meta.items() if k != "val"})
        calls[0].append(inner)
        calls[1].append(outer)
    program.refresh()
    form.place(program, layer, form.encode(found.rounded, grid=form.grid(found.rounded)))
    for reader, own in zip(readers, calls, strict=True):
        weight = program.weight(reader)
        part = replace(layer, path=f"{layer.path}#{reader.target}", calls=tuple(own),
                       weight=reader, shape=tuple(weight.shape))  # fmt: skip
        thin.place(program, part, thin.encode(weight))
        program.plan["formats"].pop(part.path)
