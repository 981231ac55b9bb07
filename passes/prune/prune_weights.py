"""Set the least important single weights to zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mopt.pass_base import Numerics, PassContext, PassResult, option, register_pass
from mopt.passes.prune._sparse import SparsePass, sparse_layers, sparsify_layers
from mopt.program import Program


@register_pass("prune-weights", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class PruneWeights(SparsePass):
    """Set single weights to zero: any, or all but n of every m.

    ## When to use
    To see how sparse a model may be, or before a runtime of its own that uses the zeros. Nothing
    that mopt lowers to is faster or smaller for them.

    ## Accuracy
    `magnitude` keeps the largest weights. `wanda` weighs them by the size of their inputs on the
    calibration data and chooses among the inputs of one output (Sun et al. 2023, "A Simple and
    Effective Pruning Approach for Large Language Models"); each layer sees what the pruned layers
    before it give.

    ## Limits
    Linear layers and convolutions; for `wanda` convolutions in one group. Embeddings and the
    model's head stay whole.

    ## Example
    Half of the weights of each layer, or the smaller two of every four.
    """

    importance: str = option(
        "auto", choices=("auto", "magnitude", "wanda"),
        help="what decides; auto: wanda with calibration data, magnitude without",
    )  # fmt: skip

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if self.importance == "wanda" and ctx.calibration is None:
            return "importance 'wanda' needs calibration data; pass calibration=[inputs, ...]"
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        pattern = self.wanted()
        wanda = self.importance == "wanda" or (
            self.importance == "auto" and ctx.calibration is not None
        )
        layers, skipped = sparse_layers(self, program, pattern, self.min_size, with_data=wanda)

        def sparsify(weight: Tensor, moment: Tensor | None) -> Tensor:
            scores = weight.abs().double()
            if moment is not None:
                scores = scores * moment.diagonal().sqrt()
            return weight * pattern.kept(scores, per_row=moment is not None)

        return sparsify_layers(self, program, ctx, layers, skipped, sparsify, with_data=wanda)
