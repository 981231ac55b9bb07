"""Round the weights of experts, each for the tokens it gets, in as many bits as it deserves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopt.formats import Encoded
from mopt.formats.base import require_finite
from mopt.formats.int_blocks import IntBlocks, padding_reason
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
from mopt.passes.quantize._calibrated import grid_for
from mopt.passes.quantize._experts import ExpertInputs, Experts, find_experts
from mopt.passes.quantize._gptq import Inputs, round_with_feedback
from mopt.passes.quantize._weights import relative_error
from mopt.program import Program, site_of
from mopt.second_order import output_error
from mopt.streaming import Stream


@register_pass("quantize-experts", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class QuantizeExperts(Pass):
    """Round the weights of experts, each for the tokens it gets, in as many bits as it deserves.

    ## When to use
    Mixture-of-experts models whose experts lie in one weight (E, out, in), as `transformers` has
    them: most of such a model's bytes are experts. Experts that are linear layers of their own are
    for the other passes.

    ## Accuracy
    GPTQ per expert, on the tokens that the router sends to it, behind the rounded experts before.
    64 rows of what the average expert reads are mixed in, so an expert that no token of the
    calibration data reaches is rounded for those. The share `high_share` of the experts of each
    weight get `high_bits`: those with the most rows times error, which is the rule of
    QuantMoE-Bench (Li et al. 2024) with an error that is measured instead of an outlier score; the
    router stays in float. The statistics say how many rows each expert got, and which got none.

    ## Limits
    float32 experts called once. Every expert has a kernel call of its own: with few tokens per
    expert that is what the float model does too.

    ## Example
    Eight experts in 4 bits, the two busiest of them in 8: 5 bits per weight.
    """

    bits: int = option(4, choices=(2, 4, 8), help="bits per weight")
    group: int = option(32, choices=(16, 32, 64, 128), help="weights that share a scale")
    high_bits: int = option(8, choices=(4, 8), help="bits of the experts that matter most")
    high_share: float = option(0.0, min=0, max=1, help="share of the experts that get those")
    refinements: int = option(2, min=0, max=20, help="rounds of fitting scales and moving codes")
    min_size: int = option(4096, min=0, help="leave experts with fewer weights alone")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        found, skipped = [], []
        for experts in find_experts(program):
            if not self.selects(experts.path):
                continue
            weight = program.weight(experts.weight)
            require_finite(weight, experts.path, site_of(experts.call))
            reason = self._reason(weight)
            if reason:
                skipped.append(Skip(experts.path, reason))
            else:
                found.append(experts)
        if not found:
            return PassResult(changed=False, stats={"layers": 0}, skipped=skipped)
        stream = Stream(program, ctx.calibration.for_part(program), ctx)
        chosen: list[tuple[Experts, list[Encoded], list[int]]] = []
        stats: dict[str, Any] = {
            "layers": len(found), "formats": {}, "weight_error": {}, "rows": {}, "unseen": {},
            "average_bits": {},
        }  # fmt: skip
        for index, experts in enumerate(found):
            ctx.progress.step(index, len(found), "experts")
            ctx.check_time(f"rounding {experts.path}")
            # The weight is replaced where it is transposed, which may come before the rows.
            stream.advance(experts.call)
            inputs = ExpertInputs(experts, stream)
            weight = program.weight(experts.weight)
            encoded, bits = self._round(weight, inputs)
            decoded = torch.stack(
                [self._form(b).decode(one) for one, b in zip(encoded, bits, strict=True)]
            )
            stream.replace_value(experts.view, decoded.transpose(1, 2))
            chosen.append((experts, encoded, bits))
            stats["rows"][experts.path] = inputs.counts
            unseen = [expert for expert, rows in enumerate(inputs.counts) if not rows]
            if unseen:
                stats["unseen"][experts.path] = unseen
            stats["average_bits"][experts.path] = sum(bits) / len(bits)
            stats["weight_error"][experts.path] = relative_error(weight, decoded)
            names = sorted({self._form(b).name for b in bits})
            stats["formats"][experts.path] = ", ".join(names)
        for experts, encoded, bits in chosen:
            self._place(program, experts, encoded, bits)
        stats["peak_activation_bytes"] = stream.peak_bytes
        program.plan.setdefault("formats", {}).update(stats["formats"])
        return PassResult(changed=True, stats=stats, skipped=skipped)

    def _form(self, bits: int) -> IntBlocks:
        return IntBlocks(bits, self.group)

    def _reason(self, weight: Tensor) -> str | None:
        if weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            return f"the weight is {kind}, the experts are computed in float32: call model.float()"
        if weight[0].numel() < self.min_size:
            return f"{weight[0].numel()} weights are fewer than min_size {self.min_size}"
        return padding_reason(weight.shape[2], self.group)

    def _round(self, weight: Tensor, inputs: ExpertInputs) -> tuple[list[Encoded], list[int]]:
        """Each expert's encoding, and its bits: more where rows times error are largest."""
        counts = inputs.counts
        encoded, harm = [], []
        for expert, one in enumerate(weight):
            moment = inputs.moment(expert)
            encoded.append(self._encode(one, moment, self.bits))
            wrong = one - self._form(self.bits).decode(encoded[-1])
            harm.append(counts[expert] * output_error(wrong, moment))
        bits = [self.bits] * len(weight)
        for expert in _largest(harm, round(self.high_share * len(weight))):
            bits[expert] = self.high_bits
            encoded[expert] = self._encode(weight[expert], inputs.moment(expert), self.high_bits)
        return encoded, bits

    def _encode(self, weight: Tensor, moment: Tensor, bits: int) -> Encoded:
        form = self._form(bits)
        grid = grid_for(form, weight, moment, "output")
        found = round_with_feedback(
            weight, Inputs.of(moment), form, grid, refinements=self.refinements
        )
        return form.encode(found.weight, grid=found.grid)

    def _place(
        self, program: Program, experts: Experts, encoded: list[Encoded], bits: list[int]
    ) -> None:
        call, base = experts.call, str(experts.weight.target)
        stored: dict[str, list[Any]] = {"codes": [], "scales": []}
        for expert, one in enumerate(encoded):
            for name, nodes in stored.items():
                path = f"{base}_{expert}_{name}"
                nodes.append(program.add_weight(path, one.tensors[name], before=call))
        target = torch.ops.mopt.grouped_linear_nbits.default
        columns = encoded[0].shape[1]
        arguments = (experts.rows, experts.ends, stored["codes"], stored["scales"], bits, columns,
                     "int8")  # fmt: skip
        program.replace_call(call, target, arguments)
        program.graph.erase_node(experts.view)
        program.graph.erase_node(experts.weight)


def _largest(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda at: (-values[at], at))[:count]
