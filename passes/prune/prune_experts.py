"""Remove experts that the data at hand hardly uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.errors import UsageError
from mopt.mixtures import Mixture, find_mixtures, remove_experts
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
from mopt.program import Program


@register_pass("prune-experts", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class PruneExperts(Pass):
    """Remove experts that the data at hand hardly uses.

    ## When to use
    For mixtures of experts that serve one task, of which calibration data like the task's is at
    hand: most of such a model's bytes are experts, and a task uses some of them.

    ## Accuracy
    The result is what the model gives with the router's scores of the removed experts at minus
    infinity: each row goes to the best of those that are left, whose shares are computed among
    themselves. `usage` counts the rows an expert is chosen for; `task` is PreMoe's
    task-conditioned score, the mean over rows of the router's score where it is among the
    `strongest` of its row, else 0. On other tasks the loss is larger.

    ## Limits
    Routers that are linear layers whose best few are taken, with experts as layers of their own or
    stacked in one weight. As many experts stay as a row is sent to. Where each expert computes its
    own rows only, the model becomes smaller and not faster.

    ## Example
    Eight experts with a ratio of 0.25 become six.
    """

    ratio: float = option(0.25, min=0, max=1, help="share of each layer's experts to remove")
    importance: str = option(
        "task", choices=("task", "usage"), help="scores of the router, or how often it chooses"
    )
    strongest: int = option(1, min=1, help="scores of a row that count, for task")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if ctx.calibration is None:
            return NEEDS_DATA
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        found, skipped = find_mixtures(program)
        mixtures = [one for one in found if self.selects(one.path)]
        if not found and not skipped:
            skipped.append(Skip("", "the model has no experts that a router chooses from"))
        wanted: list[tuple[Mixture, int]] = []
        for one in mixtures:
            count = round(self.ratio * one.experts)
            if one.experts - count < one.chosen or self.ratio == 1:
                raise UsageError(
                    f"prune-experts: ratio {self.ratio:g} would leave {one.experts - count} of "
                    f"{one.experts} experts of {one.path!r}, and each row goes to {one.chosen}",
                    code="empties-layer",
                    hint="lower ratio",
                )
            if count:
                wanted.append((one, count))
            elif self.ratio:
                skipped.append(Skip(one.path, f"{self.ratio:g} of {one.experts} experts is none"))
        if not wanted:
            return PassResult(changed=False, stats={"mixtures": 0}, skipped=skipped)
        scores = self._scores(program, [one for one, _ in wanted], ctx)
        before, work = program.parameter_count(), program.flops()
        removed: dict[str, list[int]] = {}
        for one, count in wanted:
            order = torch.argsort(scores[one.router], stable=True).tolist()
            removed[one.path] = sorted(order[:count])
            remove_experts(program, one, order[count:])
        stats: dict[str, Any] = {
            "mixtures": len(wanted),
            "removed": removed,
            "importance": {one.path: scores[one.router].tolist() for one, _ in wanted},
            "removed_parameters": 1 - program.parameter_count() / before,
            "removed_flops": 1 - program.flops() / work,
            "gain_class": "size" if any(one.stacked for one, _ in wanted) else "any",
        }
        return PassResult(changed=True, stats=stats, skipped=skipped)

    def _scores(
        self, program: Program, mixtures: list[Mixture], ctx: PassContext
    ) -> dict[fx.Node, Tensor]:
        assert ctx.calibration is not None
        chosen = {one.router: one.chosen for one in mixtures}
        totals = {one.router: torch.zeros(one.experts, dtype=torch.float64) for one in mixtures}
        rows = dict.fromkeys(chosen, 0)

        def visit(node: fx.Node, value: Any) -> None:
            if node in chosen:
                logits = value.flatten(0, -2).double()
                rows[node] += len(logits)
                totals[node] += self._of_rows(logits, chosen[node])

        for args, kwargs in ctx.calibration.for_part(program):
            ctx.check_time("scoring experts")
            program.interpret(visit, args, kwargs)
        return {node: total / max(rows[node], 1) for node, total in totals.items()}

    def _of_rows(self, logits: Tensor, chosen: int) -> Tensor:
        """The sum over rows of each expert's score."""
        count = chosen if self.importance == "usage" else min(self.strongest, logits.shape[1])
        best, place = logits.topk(count, dim=-1)
        value = torch.ones_like(best) if self.importance == "usage" else best
        return torch.zeros_like(logits).scatter(-1, place, value).sum(0)
