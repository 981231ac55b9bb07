"""Set single weights to zero and let the others make up for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mopt.pass_base import NEEDS_DATA, Numerics, PassContext, PassResult, option, register_pass
from mopt.passes.prune._compensate import prune_compensated
from mopt.passes.prune._sparse import SparsePass, sparse_layers, sparsify_layers
from mopt.program import Program


@register_pass("prune-sparsegpt", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class PruneSparsegpt(SparsePass):
    """Set single weights to zero so that the remaining ones make up for them (SparseGPT).

    ## When to use
    Where single zeros are wanted at all: at half of the weights, or two of every four, it keeps
    most of what plain pruning loses. Nothing that mopt lowers to is faster or smaller for zeros.

    ## Accuracy
    One pass over the columns of every layer, with the second moment of the layer's inputs on the
    calibration data; each layer sees what the pruned layers before it give. The statistics
    `output_error` say, per layer, how large the error of its output is, as a share of its power.

    ## Limits
    Linear layers and convolutions in one group; embeddings and the model's head stay whole. Time
    grows with the cube of a layer's inputs.

    ## Example
    `pattern="2:4"` keeps two of every four weights.
    """

    damping: float = option(0.01, min=0, max=0.1, help="added to the second moment's diagonal")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if ctx.calibration is None:
            return NEEDS_DATA
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        pattern = self.wanted()
        layers, skipped = sparse_layers(self, program, pattern, self.min_size, with_data=True)

        def sparsify(weight: Tensor, moment: Tensor | None) -> Tensor:
            assert moment is not None
            return prune_compensated(weight, moment, pattern, damping=self.damping).weight

        return sparsify_layers(self, program, ctx, layers, skipped, sparsify, with_data=True)
