"""Compute the few large activations apart, so that the rest keeps its precision in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.formats.base import require_finite
from mopt.layers import LINEAR
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
from mopt.passes.quantize._calibrated import Group, visit_inputs
from mopt.passes.quantize._scales import find_edges_to_scale, first_reader, set_weight
from mopt.passes.quantize._trials import output_error_of, round_rows, rounded_error, spread_rows
from mopt.program import Program
from mopt.streaming import Stream

_aten = torch.ops.aten
# Shares of magnitudes below which a value counts as ordinary.
_QUANTILES = (0.9, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)


@register_pass("split-outliers", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class SplitOutliers(Pass):
    """Compute the few large activations apart, so that the rest keeps its precision in 8 bits.

    ## When to use
    Before weights and activations are rounded to int8, where a few large activations make the
    range wide and neither rescaling nor rotating has helped enough.

    ## Accuracy
    Rounding: a layer becomes the sum of two, whose inputs add up to its own. `by = "channel"` is
    LLM.int8 (Dettmers et al. 2022) with channels chosen beforehand: those that exceed `threshold`
    on calibration data, at most the share `most`, are gathered and stay in float; the int8 layer
    sees zeros in their place. `by = "value"` (no published method) clips the input, and gives what
    was cut off to a second call of the same layer: both are rounded to int8 with a range of their
    own, and where most of the second input is exactly zero only the outliers are rounded coarsely.
    Either happens only where, on up to `rows` rows of calibration data and rounded as they will be,
    the layers' outputs keep at most the share `keep` of their error.

    ## Limits
    Inputs of linear layers. By value, a layer's product is computed twice, on the same codes; by
    channel, a gather and a small float product are added.

    ## Example
    Values up to 60 among values below 2 are clipped at 2.5; the second call gets the 0.1 percent
    that are larger, less 2.5.
    """

    by: str = option("channel", choices=("channel", "value"), help="what is computed apart")
    threshold: float = option(6.0, min=0, help="magnitude from which a channel is an outlier")
    most: float = option(0.01, min=0, max=1, help="largest share of channels in float")
    keep: float = option(0.5, min=0, max=1, help="split where at most this share of error is left")
    rows: int = option(512, min=1, help="rows of activations that are compared on")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        edges, skipped = find_edges_to_scale(program, self.selects, insert=True)
        groups = [edge.group for edge in edges]
        for group in groups:
            for one in group.layers:
                require_finite(program.weight(one.weight), one.path, one.source)
        if not groups:
            return PassResult(changed=False, stats={"edges": 0}, skipped=skipped)
        stream = Stream(program, ctx.calibration.for_part(program), ctx)
        left: dict[str, float] = {}
        apart: dict[str, Any] = {}
        chosen: list[tuple[Group, float | Tensor]] = []
        for group, value, _ in visit_inputs(program, stream, groups):
            path = ",".join(layer.path for layer in group.layers)
            ctx.progress.step(len(left), len(groups), "edges")
            ctx.check_time(f"looking for outliers in the inputs of {path}")
            values = stream.values(value)
            rows = torch.cat([spread_rows(v, max(1, self.rows // len(values))) for v in values])
            weights = [program.weight(layer.weight) for layer in group.layers]
            if self.by == "value":
                left[path], limit = clip_error(rows, weights)
                found: float | Tensor | None = limit
                apart[path] = limit
            else:
                found = channels = outlier_channels(values, self.threshold, self.most)
                apart[path] = len(channels)
                left[path] = channel_error(rows, weights, channels) if len(channels) else 1.0
            if left[path] <= self.keep:
                chosen.append((group, found))
            else:
                skipped.append(Skip(path, f"a split leaves {left[path]:.0%} of the error"))
        for group, found in chosen:
            if isinstance(found, Tensor):
                _split_channels(program, group, found)
            else:
                _split_values(program, group, found)
        stats = {"edges": len(chosen), "error_left": left, "apart": apart,
                 "peak_activation_bytes": stream.peak_bytes}  # fmt: skip
        return PassResult(changed=bool(chosen), stats=stats, skipped=skipped)


def outlier_channels(values: list[Tensor], threshold: float, most: float) -> Tensor:
    """Indices of channels that exceed ``threshold`` anywhere, the largest if they are too many."""
    largest = torch.stack([value.abs().flatten(0, -2).amax(0) for value in values]).amax(0)
    room = int(most * len(largest))
    order = torch.argsort(largest, descending=True, stable=True)[:room]
    return order[largest[order] > threshold].sort().values


def channel_error(rows: Tensor, weights: list[Tensor], apart: Tensor) -> float:
    """The squared error with those channels in float, as a share of that with all in int8."""
    plain = rounded_error(rows, weights)
    kept = torch.ones_like(rows[0])
    kept[apart] = 0
    rest = rows * kept
    tried = output_error_of(rest, round_rows(rest), weights, kept.mul)
    return tried / plain if plain > 0 else 1.0


def clip_error(rows: Tensor, weights: list[Tensor]) -> tuple[float, float]:
    """The share of error that the best split by value leaves, and where it clips."""
    plain = rounded_error(rows, weights)
    ordered = rows.abs().flatten().sort().values
    best, limit = 1.0, float(ordered[-1])
    for quantile in _QUANTILES:
        at = float(ordered[min(int(quantile * len(ordered)), len(ordered) - 1)])
        inner = rows.clamp(-at, at)
        rounded = round_rows(inner) + round_rows(rows - inner)
        error = output_error_of(rows, rounded, weights) / plain if plain > 0 else 1.0
        if error < best:
            best, limit = error, at
    return best, limit


def _split_values(program: Program, group: Group, limit: float) -> None:
    value, first = group.inputs[0], first_reader(program, group)
    inner = program.insert_call(_aten.clamp.default, (value, -limit, limit), like=first)
    outer = program.insert_call(_aten.sub.Tensor, (value, inner), like=first)
    for layer in group.layers:
        call = layer.calls[0]
        call.update_arg(0, inner)
        more = _after(program, call, LINEAR[0], (outer, call.args[1]))
        _add(program, call, more)


def _split_channels(program: Program, group: Group, apart: Tensor) -> None:
    value, first = group.inputs[0], first_reader(program, group)
    dtype = value.meta["val"].dtype
    mask = torch.ones(group.layers[0].shape[1], dtype=dtype, device=apart.device)
    mask[apart] = 0
    stored = program.add_weight(f"{value.name}_ordinary", mask, before=first)
    index = program.add_weight(f"{value.name}_outliers", apart, before=first)
    rest = program.insert_call(_aten.mul.Tensor, (value, stored), like=first)
    large = program.insert_call(_aten.index_select.default, (value, -1, index), like=first)
    for layer in group.layers:
        call = layer.calls[0]
        weight = program.weight(layer.weight)
        columns = program.add_weight(
            f"{layer.weight.target}_outliers", weight[:, apart].t().contiguous(), before=call
        )
        call.update_arg(0, rest)
        set_weight(program, call, lambda one: one * mask.to(one.dtype))
        # Not a linear layer: what rounds those must leave these columns alone.
        _add(program, call, _after(program, call, _aten.matmul.default, (large, columns)))


def _after(program: Program, call: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    node = program.insert_call(target, args, like=call.next)
    node.meta.update({k: v for k, v in call.meta.items() if k != "val"})
    return node


def _add(program: Program, call: fx.Node, more: fx.Node) -> None:
    total = program.insert_call(_aten.add.Tensor, (call, more), like=more.next)
    total.meta.update({k: v for k, v in call.meta.items() if k != "val"})
    call.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
