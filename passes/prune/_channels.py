"""What passes share that remove channels, neurons and heads: their options, and how they choose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mopt.axes import Mask
from mopt.cost import CostModel, cost_model
from mopt.coupling import Coupling, Group, find_coupling, shrink
from mopt.device import find_device
from mopt.errors import UsageError
from mopt.ladder import Ladder
from mopt.layer_request import preferred_multiple
from mopt.pass_base import Pass, PassContext, PassResult, Skip, option
from mopt.passes.prune._select import select_global, select_uniform
from mopt.passes.prune._speed import LayerTimes
from mopt.program import Program, module_path
from mopt.refit import refit
from mopt.stream_rotation import rotate_streams
from mopt.unit_scores import (
    Scores,
    collect_moments,
    gradient_scores,
    magnitude_scores,
    output_scores,
)

_NEED_DATA = ("activation", "reconstruction", "taylor", "fisher")


@dataclass(frozen=True, kw_only=True)
class ChannelPass(Pass):
    """A pass that makes widths smaller; :meth:`prune` does it once."""

    ratio: float = option(0.25, min=0, max=1, help="share to remove")
    aim: str = option(
        "flops", choices=("flops", "parameters", "channels"), help="what the share is of"
    )
    importance: str = option(
        "auto",
        choices=("auto", "magnitude", "activation", "reconstruction", "taylor", "fisher"),
        help="what decides; auto: reconstruction with calibration data, magnitude without",
    )  # fmt: skip
    scope: str = option(
        "uniform", choices=("uniform", "global"),
        help="the same share of every layer, or the least important units of all layers",
    )  # fmt: skip
    multiple: int = option(
        0, min=0, help="widths stay multiples of this; 0: what the device prefers, 1: any width"
    )
    residual: bool = option(
        False, help="the width of residual streams too, through the norms that run over it"
    )
    most: float = option(0.9, min=0, max=1, help="largest share of one layer to remove")
    refit: bool = option(True, help="fit the remaining weights to the original outputs, with data")
    allow_slower: bool = option(False, help="remove even where it is not estimated to be faster")
    least_gain: float = option(
        0.03, min=0, max=1, help="estimated share of time below which nothing is removed"
    )

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if self.importance in _NEED_DATA and ctx.calibration is None:
            return (
                f"importance {self.importance!r} needs calibration data; pass "
                "calibration=[inputs, ...] (or --calib)"
            )
        return None

    def prune(self, program: Program, ctx: PassContext) -> PassResult:
        """Remove units from ``program``, as the options say, and fit what reads them.

        With data, residual streams are turned to their principal axes first, if they then shrink.
        """
        if not self.residual or ctx.calibration is None:
            return self._prune(program, ctx)
        turned = program.copy()
        streams, skips = rotate_streams(turned, ctx, self._may_shrink)
        result = self._prune(turned if streams else program, ctx)
        if streams and result.changed:
            widths = result.stats["widths"]
            if all(f"{path} (stream channels)" in widths for path in streams):
                program.graph_module = turned.graph_module
                kept = turned.plan["kept_channels"]
                # What these write now are no channels of the original.
                rotated = {name for names in streams.values() for name in names}
                program.plan["kept_channels"] = {k: v for k, v in kept.items() if k not in rotated}
                stats = {**result.stats, "rotated_streams": len(streams)}
                result = replace(result, stats=stats)
            else:  # later passes compare values of equal width with the original's
                result = self._prune(program, ctx)
        return replace(result, skipped=[*result.skipped, *skips])

    def _prune(self, program: Program, ctx: PassContext) -> PassResult:
        found = find_coupling(program, through_norms=self.residual)
        skipped = list(found.skips)
        groups = [group for group in found.groups if self._may_shrink(group)]
        model = ctx.cost_model or cost_model(ctx.device or find_device("host"))
        scores = self._scores(program, found, ctx)
        ladders = []
        for group in groups:
            multiple = self.multiple or preferred_multiple(model, _layer_kind(group))
            ladder = Ladder.of(group, scores, multiple, self.most)
            ladders.append(ladder)
            if len(ladder.counts) == 1:
                skipped.append(Skip(group.path, _too_narrow(group, multiple)))
        if self.ratio == 0:
            skipped.append(Skip("", "a ratio of 0 removes nothing"))
        removed = self._select(found, ladders, scores)
        removed = self._only_faster(found, ladders, removed, model, skipped)
        if not removed.any():
            return PassResult(changed=False, stats={"groups": 0}, skipped=skipped)
        stats = _statistics(found, groups, removed, model)
        original = program.copy()
        kept = shrink(program, found, removed)
        known: dict[str, list[int]] = program.plan.get("kept_channels", {})
        program.plan["kept_channels"] = known | {
            name: [known[name][at] for at in places] if name in known else places.tolist()
            for name, places in kept.items()
        }
        if self.refit and ctx.calibration is not None:
            stats["refit"] = refit(program, original, kept, ctx)
        return PassResult(changed=True, stats=stats, skipped=skipped)

    def _may_shrink(self, group: Group) -> bool:
        writers = {member.call for member in group.of_role("out")}
        paths = {module_path(call) or call.name for call in writers} or {group.path}
        return all(self.selects(path) for path in paths)

    def _scores(self, program: Program, found: Coupling, ctx: PassContext) -> Scores:
        kind = self.importance
        if kind == "auto":
            kind = "magnitude" if ctx.calibration is None else "reconstruction"
        if kind == "magnitude":
            return magnitude_scores(program, found)
        if kind in ("taylor", "fisher"):
            return gradient_scores(program, found, ctx, squared_first=kind == "fisher")
        moments = collect_moments(program, found, ctx)
        return output_scores(program, found, moments, reconstruct=kind == "reconstruction")

    def _select(self, found: Coupling, ladders: list[Ladder], scores: Scores) -> Mask:
        nothing = np.zeros(found.unit_count, dtype=bool)
        if self.ratio == 0 or not any(len(one.counts) > 1 for one in ladders):
            return nothing
        total = sum(len(one.order) for one in ladders)
        before = {"flops": found.flops(nothing), "parameters": found.parameters(nothing)}

        def saved(removed: Mask) -> float:
            if self.aim == "channels":
                return float(removed.sum()) / total
            after = found.flops(removed) if self.aim == "flops" else found.parameters(removed)
            return 1 - after / before[self.aim]

        if self.scope == "global":
            removed = select_global(found, ladders, saved, self.ratio, scores)
        else:
            removed = select_uniform(
                found, ladders, saved, self.ratio, scores, of_channels=self.aim == "channels"
            )
        if removed is None or self.ratio == 1:
            reached = saved(_longest(nothing, ladders))
            finer = [Ladder.of(one.group, scores, 1, self.most) for one in ladders]
            any_width = saved(_longest(nothing, finer))
            if self.ratio < 1 and any_width >= self.ratio:
                raise UsageError(
                    f"{self.pass_name}: widths in the multiples that the device computes at once "
                    f"allow at most {reached:.3g} of the {self.aim} to go, not {self.ratio:g}",
                    code="widths-too-coarse",
                    hint=f"lower ratio, or set multiple=1: any width, {any_width:.3g} at most",
                )
            raise UsageError(
                f"{self.pass_name}: ratio {self.ratio:g} would empty layers: at most "
                f"{reached:.3g} of the {self.aim} can go",
                code="empties-layer",
                hint=f"lower ratio, raise most, or set multiple=1 ({any_width:.3g} at most)",
            )
        return removed

    def _only_faster(
        self, found: Coupling, ladders: list[Ladder], removed: Mask, model: CostModel,
        skipped: list[Skip],
    ) -> Mask:  # fmt: skip
        if self.allow_slower or not removed.any():
            return removed
        times = LayerTimes(found, model)
        removed, idle = times.restore_idle([one.group for one in ladders], removed)
        skipped += [Skip(group.path, "a smaller width is not estimated to be faster")
                    for group in idle]  # fmt: skip
        before = times.total(np.zeros_like(removed))
        after = times.total(removed)
        if removed.any() and after > before * (1 - self.least_gain):
            gain = 100 * (1 - after / before)
            why = f"the pruned model is estimated to be {gain:.2g} % faster, less than "
            skipped.append(Skip("", f"{why}{100 * self.least_gain:g} %: nothing is removed"))
            return np.zeros_like(removed)
        return removed


def _longest(nothing: Mask, ladders: list[Ladder]) -> Mask:
    """As many units of every group as may go."""
    most = nothing.copy()
    for one in ladders:
        most[one.order[: one.counts[-1]]] = True
    return most


def _layer_kind(group: Group) -> str:
    return "convolution" if group.kind == "channels" else "linear"


def _too_narrow(group: Group, multiple: int) -> str:
    width = len(group.units) * group.width
    return f"{width} {group.kind} cannot shrink to a smaller multiple of {multiple}"


def _statistics(
    found: Coupling, groups: list[Group], removed: Mask, model: CostModel
) -> dict[str, Any]:
    nothing = np.zeros_like(removed)
    times = LayerTimes(found, model)
    changed = [group for group in groups if removed[group.units].any()]
    return {
        "groups": len(changed),
        "removed_units": int(removed.sum()),
        "removed_flops": 1 - found.flops(removed) / found.flops(nothing),
        "removed_parameters": 1 - found.parameters(removed) / found.parameters(nothing),
        "estimated_layer_ms": {"before": times.total(nothing), "after": times.total(removed)},
        "gain_class": "any",
        "widths": {
            f"{group.path} ({group.kind})": [
                len(group.units), int((~removed[group.units]).sum())
            ]
            for group in changed
        },
    }  # fmt: skip
