"""Set single weights to zero and let the others make up for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mopt.errors import UsageError
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, option, register_pass
from mopt.passes.prune._compensate import prune_compensated
from mopt.passes.prune._masks import Pattern, size_only
from mopt.passes.prune._sparse import sparse_layers, sparsify_layers
from mopt.program import Program


@register_pass("prune-sparsegpt", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class PruneSparsegpt(Pass):
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

    ratio: float = option(0.5, min=0, max=1, help="share of zeros, where pattern is unstructured")
    pattern: str = option("unstructured", help="unstructured, or n:m such as 2:4")
    damping: float = option(0.01, min=0, max=0.1, help="added to the second moment's diagonal")
    min_size: int = option(1024, min=0, help="leave layers with fewer weights alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        Pattern.parse(self.pass_name, self.pattern, self.ratio)

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if ctx.calibration is None:
            return "needs calibration data; pass calibration=[inputs, ...] (or --calib)"
        return None

    def notice(self, backend: str) -> str | None:
        return size_only(backend)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        pattern = Pattern.parse(self.pass_name, self.pattern, self.ratio)
        if pattern.ratio == 1:
            raise UsageError(
                "prune-sparsegpt: ratio 1 would empty every layer",
                code="empties-layer",
                hint="give a ratio below 1",
            )
        layers, skipped = sparse_layers(self, program, pattern, self.min_size, with_data=True)

        def sparsify(weight: Tensor, moment: Tensor | None) -> Tensor:
            assert moment is not None
            return prune_compensated(weight, moment, pattern, damping=self.damping).weight

        return sparsify_layers(self, program, ctx, layers, skipped, sparsify, with_data=True)
