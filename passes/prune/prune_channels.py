"""Remove channels, neurons and heads that matter little, and make the model really smaller."""

from __future__ import annotations

from dataclasses import dataclass

from mopt.pass_base import Numerics, PassContext, PassResult, register_pass
from mopt.passes.prune._channels import ChannelPass
from mopt.program import Program


@register_pass("prune-channels", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class PruneChannels(ChannelPass):
    """Remove channels, FFN neurons and attention heads, with all that goes along with them.

    ## When to use
    To make a model faster on every backend: what is left is an ordinary, smaller dense model. A
    quarter of the FLOPs often goes with little loss; more needs recovery afterwards.

    ## Accuracy
    The result equals the original with those channels set to zero where they are read. With
    calibration data the layers that read them are then fitted again, so that their outputs stay as
    near to the original ones as the remaining channels allow (`refit`).
    With `residual` and data, residual streams behind RMS norms are turned to their principal axes
    before they shrink (Ashkboos et al. 2024, "SliceGPT").

    ## Limits
    What an operator without a rule touches, what the model takes or returns, and widths that a
    layer norm runs over stay whole; each such layer is skipped with the reason. Widths stay
    multiples of `multiple`; where the cost model of the device says that a smaller width is not
    faster, it is not made. Removed shares are counted on the example inputs.

    ## Example
    A feed-forward layer of 1024 neurons with a ratio of 0.25 becomes one of 768.
    """

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Remove once what the options ask for."""
        return self.prune(program, ctx)
