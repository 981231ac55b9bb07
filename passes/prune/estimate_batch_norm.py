"""Estimate the statistics of batch norms anew after channels or weights were removed."""

from __future__ import annotations

from dataclasses import dataclass

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
from mopt.passes.prune._distill import Distillation, find_teacher
from mopt.passes.prune._moments import restore_moments
from mopt.program import Program


@register_pass("estimate-batch-norm", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class EstimateBatchNorm(Pass):
    """Estimate the statistics of batch norms anew after channels or weights were removed.

    ## When to use
    Behind passes that prune convolutional models, where there are too few rows or too little time
    to fit layers: means and variances take a few batches, and no weight is trained.

    ## Accuracy
    Each norm gets the mean and variance of what it now reads on the calibration data, behind the
    norms before it. Norms that were folded into convolutions are treated alike: every channel is
    scaled and shifted to the moments it had in the program before the first lossy pass. It is kept
    only if the outputs come nearer to that program's.

    ## Limits
    Convolutional models. Other weights stay as they are.

    ## Example
    A ResNet without a third of its channels gives sums that are too small; this sets them right.
    """

    batches: int = option(16, min=1, help="batches on which it is judged, most")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if ctx.calibration is None:
            return NEEDS_DATA
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        teacher = find_teacher(program, ctx, "estimate")
        if isinstance(teacher, str):
            return _left(teacher)
        trial = program.copy()
        layers = restore_moments(trial, teacher, program.plan.get("kept_channels", {}), ctx)
        if not layers:
            return _left("there is no batch norm, nor a convolution that one was folded into")
        judged = [b for _, b in zip(range(self.batches), ctx.calibration.for_part(program),
                                    strict=False)]  # fmt: skip
        before, after = (
            Distillation(one, teacher, [], 1.0, 0.0).judge({}, judged) for one in (program, trial)
        )
        stats = {"layers": layers, "distance": {"before": before, "after": after}}
        if not after < before:
            left = _left("new statistics do not bring the outputs nearer")
            return PassResult(changed=False, stats=stats, skipped=left.skipped)
        restore_moments(program, teacher, program.plan.get("kept_channels", {}), ctx)
        return PassResult(changed=True, stats=stats)


def _left(reason: str) -> PassResult:
    return PassResult(changed=False, stats={"layers": 0}, skipped=[Skip("", reason)])
