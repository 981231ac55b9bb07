"""Prune in rounds to a budget of memory and computation, each time the best of several ways."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mopt.calibration import Call
from mopt.cost import cost_model
from mopt.coupling import find_coupling
from mopt.device import find_device
from mopt.errors import UsageError
from mopt.pass_base import (
    NEEDS_DATA,
    Numerics,
    PassContext,
    PassResult,
    Skip,
    option,
    register_pass,
)
from mopt.passes.prune._channels import ChannelPass
from mopt.passes.prune._distill import Distillation
from mopt.passes.prune._moments import restore_moments
from mopt.passes.prune._speed import LayerTimes
from mopt.program import Program

# Importance and scope of what is compared in every round.
_WAYS = (
    ("reconstruction", "uniform"), ("reconstruction", "global"), ("magnitude", "uniform"),
    ("taylor", "global"),
)  # fmt: skip


@register_pass("prune-progressively", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class PruneProgressively(ChannelPass):
    """Prune in rounds to a budget of memory and computation, each time the best of several ways.

    ## When to use
    Where a device gives the budget, and for deep cuts: what matters changes as units go, and no
    score is the best for every model.

    ## Accuracy
    Every round several candidates are made (scores of several kinds, equal shares or the least
    important of all layers), their batch norms are estimated anew, and the one whose outputs are
    nearest to the original's on batches held back is kept: FedTiny's choice of a coarse mask by
    re-estimated norms and its progressive schedule (Huang et al. 2023, "Distributed Pruning Towards
    Tiny Neural Networks in Federated Learning"), on one machine and for whole channels, because
    single zeros save neither memory nor time here. Shares fall by the cubic schedule of Zhu and
    Gupta 2017.

    ## Limits
    Those of channel pruning; `ratio`, `aim`, `importance` and `scope` are chosen in every round.
    Time grows with rounds times candidates.

    ## Example
    `flops=0.5` and `memory=0.4` leave half of the work and two fifths of the bytes, or less.
    """

    flops: float = option(0.5, min=0, max=1, help="share of the work that may stay")
    memory: float = option(1.0, min=0, max=1, help="share of the weights' bytes that may stay")
    rounds: int = option(3, min=1, max=50, help="rounds of pruning")
    candidates: int = option(3, min=1, max=len(_WAYS), help="ways that each round compares")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if ctx.calibration is None:
            return NEEDS_DATA
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        if 0 in (self.flops, self.memory):
            raise UsageError(
                "prune-progressively: a budget of 0 would empty every layer",
                code="empties-layer",
                hint="give flops and memory above 0",
            )
        batches = list(ctx.calibration.for_part(program))
        judged = batches[:: max(len(batches) // 4, 1)][:4]
        whole = program.copy()
        story: list[dict[str, Any]] = []
        current = program.copy()
        skipped: list[Skip] = []
        # Rounds note what they keep of this program; passes before them, of an earlier one.
        earlier = current.plan.pop("kept_channels", {})
        for turn in range(1, self.rounds + 1):
            ctx.progress.step(turn, self.rounds, "rounds")
            ctx.check_time("pruning in rounds")
            done = 1 - (1 - turn / self.rounds) ** 3
            best = self._round(current, whole, done, judged, ctx)
            if best is not None:
                distance, way, result, skipped = best
                current = result
                story.append({"way": list(way), "distance": distance})
        found = find_coupling(program)
        if not story:
            skipped = [*found.skips, Skip("", "the model is within the budget")]
            return PassResult(changed=False, stats={"rounds": []}, skipped=skipped)
        model = ctx.cost_model or cost_model(ctx.device or find_device("host"))
        before, after = (_layer_time(one, model) for one in (program, current))
        if not self.allow_slower and after > before * (1 - self.least_gain):
            why = "the pruned model is not estimated to be faster: nothing is removed"
            return PassResult(changed=False, stats={"rounds": story}, skipped=[Skip("", why)])
        stats = {
            "rounds": story,
            "removed_flops": 1 - current.flops() / program.flops(),
            "removed_parameters": 1 - current.parameter_count() / program.parameter_count(),
            "removed_bytes": 1 - current.size_bytes() / program.size_bytes(),
            "estimated_layer_ms": {"before": before, "after": after},
            "gain_class": "any",
        }
        kept = {
            name: [earlier[name][at] for at in places] if name in earlier else places
            for name, places in current.plan["kept_channels"].items()
        }
        program.graph_module = current.graph_module
        program.plan["kept_channels"] = {**earlier, **kept}
        return PassResult(changed=True, stats=stats, skipped=skipped)

    def _round(
        self, current: Program, whole: Program, done: float, judged: list[Call], ctx: PassContext
    ) -> tuple[float, tuple[str, str], Program, list[Skip]] | None:
        """The best of the candidates that reach this round's budget; None if it is kept already."""
        best = None
        for way in _WAYS[: self.candidates]:
            result, skips = current.copy(), []
            changed = False
            for aim, now, limit in (
                ("flops", lambda one: one.flops(), self.flops),
                ("parameters", lambda one: one.parameter_count(), self.memory),
            ):
                goal = now(whole) * (1 - done * (1 - limit))
                if now(result) <= goal:
                    continue
                once = replace(
                    self, aim=aim, ratio=1 - goal / now(result), importance=way[0], scope=way[1],
                    allow_slower=True,
                )  # fmt: skip
                step = once.prune(result, ctx)
                changed, skips = changed or step.changed, list(step.skipped)
            if not changed:
                return best
            restore_moments(result, whole, result.plan.get("kept_channels", {}), ctx)
            distance = Distillation(result, whole, [], 1.0, 0.0).judge({}, judged)
            if best is None or distance < best[0]:
                best = distance, way, result, skips
        return best


def _layer_time(program: Program, model: Any) -> float:
    found = find_coupling(program)
    return LayerTimes(found, model).total(np.zeros(found.unit_count, dtype=bool))
