"""Leave out whole blocks that change little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mopt.blocks import Block, bypass, find_blocks, find_sublayers
from mopt.errors import UsageError
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
from mopt.passes.prune._distill import distance
from mopt.program import Program
from mopt.trainable import Trainable


@register_pass("prune-blocks", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class PruneBlocks(Pass):
    """Leave out whole blocks, or residual sublayers, that change little.

    ## When to use
    For speed first: a model without a quarter of its blocks is nearly that much faster on every
    device and at every batch size. Deep models lose little, shallow ones more than by narrower
    layers; training afterwards wins much of it back.

    ## Accuracy
    The result equals the original with what goes into each removed block in place of what comes
    out. `influence` is one minus the mean cosine of the two, per row, on calibration data (Men et
    al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", eq.
    1); `loss` is what the outputs move when the block alone is left out, which takes a run of the
    model per block and batch, and is the surer guide.

    ## Limits
    Blocks are the modules of numbered lists with one result that has the form of one of their
    inputs and is a sum with it; sublayers are residual sums. The first `keep_first` and the last
    `keep_last` stay.

    ## Example
    Twelve blocks with a ratio of 0.25 become nine.
    """

    ratio: float = option(0.25, min=0, max=1, help="share of the blocks to remove")
    what: str = option(
        "blocks", choices=("blocks", "sublayers"),
        help="whole blocks, or single residual sums (attention, feed-forward)",
    )  # fmt: skip
    importance: str = option(
        "loss", choices=("loss", "influence"),
        help="change of the outputs without it, or of the values it passes on",
    )  # fmt: skip
    keep_first: int = option(1, min=0, help="blocks at the start that stay")
    keep_last: int = option(1, min=0, help="blocks at the end that stay")
    batches: int = option(8, min=1, help="calibration batches to judge by, most")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if ctx.calibration is None:
            return NEEDS_DATA
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        if self.what == "blocks":
            found, skipped = find_blocks(program)
        else:
            found, skipped = find_sublayers(program), []
        free = found[self.keep_first : len(found) - self.keep_last]
        free = [block for block in free if self.selects(block.path)]
        count = round(self.ratio * len(found))
        if self.ratio == 1 or (free and count > len(free)):
            raise UsageError(
                f"prune-blocks: ratio {self.ratio:g} would remove {count} of {len(found)} "
                f"{self.what}, of which {len(free)} may go",
                code="empties-layer",
                hint="lower ratio, keep_first or keep_last",
            )
        if not found:
            skipped.append(Skip("", f"the model has no {self.what} that could be left out"))
        elif not count and self.ratio:
            skipped.append(Skip("", f"{self.ratio:g} of {len(found)} {self.what} is none"))
        if not count or not free:
            return PassResult(changed=False, stats={"blocks": 0}, skipped=skipped)
        scores = self._scores(program, free, ctx)
        order = sorted(range(len(free)), key=lambda at: (scores[at], at))
        removed = [free[at] for at in sorted(order[:count])]
        stats: dict[str, Any] = {
            "blocks": count,
            "of": len(found),
            "removed": [block.path for block in removed],
            "importance": {b.path: s for b, s in zip(free, scores, strict=True)},
            "gain_class": "any",
        }
        before, size = program.flops(), program.parameter_count()
        # From the last on: what goes into a block may be what an earlier one gives.
        bypass(program, reversed(removed))
        stats["removed_flops"] = 1 - program.flops() / before
        stats["removed_parameters"] = 1 - program.parameter_count() / size
        return PassResult(changed=True, stats=stats, skipped=skipped)

    def _scores(self, program: Program, blocks: list[Block], ctx: PassContext) -> list[float]:
        assert ctx.calibration is not None
        totals, count = [0.0] * len(blocks), 0
        for args, kwargs in ctx.calibration.for_part(program):
            if count == self.batches:
                break
            count += 1
            ctx.progress.step(count, self.batches, "batches")
            ctx.check_time("judging blocks")
            if self.importance == "influence":
                found = _influences(program, blocks, args, kwargs)
            else:
                found = _losses(program, blocks, args, kwargs)
            totals = [total + one for total, one in zip(totals, found, strict=True)]
        return [total / max(count, 1) for total in totals]


def _influences(
    program: Program, blocks: list[Block], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[float]:
    held: dict[fx.Node, Tensor] = {}
    firsts = {block.first for block in blocks}
    lasts = {block.last: at for at, block in enumerate(blocks)}
    found = [0.0] * len(blocks)

    def visit(node: fx.Node, value: Any) -> None:
        if node in lasts:
            found[lasts[node]] = influence(held[blocks[lasts[node]].first], value)
        if node in firsts:
            held[node] = value

    program.interpret(visit, args, kwargs)
    return found


def influence(first: Tensor, last: Tensor) -> float:
    """One minus the mean cosine of the rows: the last axis, or the channels of images."""
    axis = 1 if first.dim() > 3 else -1
    return float(1 - F.cosine_similarity(first.float(), last.float(), dim=axis).mean())


def _losses(
    program: Program, blocks: list[Block], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[float]:
    with torch.no_grad():
        wanted = Trainable(program, {}).outputs(args, kwargs)
        return [
            float(distance(_Without(program, block).outputs(args, kwargs), wanted, 1.0))
            for block in blocks
        ]


class _Without(Trainable):
    """A program run as if a block were not there."""

    def __init__(self, program: Program, block: Block) -> None:
        super().__init__(program, {})
        self._block = block

    def run_node(self, n: fx.Node) -> Any:
        """What goes into the block in place of what comes out of it."""
        value = super().run_node(n)
        if n is self._block.first:
            self._held = value
        return self._held if n is self._block.last else value
