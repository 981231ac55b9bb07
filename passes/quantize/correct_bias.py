"""Shift the biases of rounded layers so that their outputs keep their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.layers import LINEAR
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
from mopt.program import Program, module_path
from mopt.streaming import Stream

_mopt = torch.ops.mopt
# Where each operator has its bias.
_BIAS = {
    _mopt.linear_nbits.default: 4,
    _mopt.linear_dynamic_int8.default: 3,
    **dict.fromkeys(LINEAR, 2),
}
_REPEATED = "it is called several times, for which one bias cannot make up"


@register_pass("correct-bias", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class CorrectBias(Pass):
    """Shift the biases of rounded layers so that their outputs keep their means.

    ## When to use
    Behind passes that round weights or activations, with the calibration data at hand. It costs a
    bias per layer and no time where there is one already.

    ## Accuracy
    Rounding moves the mean of a layer's output per channel. The difference between its mean in the
    program before the first lossy pass and its mean now, over all calibration rows, is added to
    the bias (Nagel et al. 2019, "Data-Free Quantization", section 4.2, measured on data), layer by
    layer, each behind the corrected ones before it. On that data the means then agree.

    ## Limits
    Linear layers that were rounded, are called once, and keep their name. Layers with static ranges
    are left alone: their biases are 32-bit codes, and one in float would cost them their integer
    kernel. The data runs through both programs.

    ## Example
    A layer whose third output lies 0.02 too low on average gets 0.02 more in its third bias.
    """

    smallest: float = option(
        1e-3, min=0, help="leave layers alone whose means move by less than this many deviations"
    )

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        skipped: list[Skip] = []
        source = ctx.unrounded.parts().get(program.path) if ctx.unrounded is not None else None
        pairs = _pairs(program, source, self, skipped) if source is not None else []
        if source is None or not pairs:
            return PassResult(changed=False, stats={"layers": 0}, skipped=skipped)
        stream = Stream(program, ctx.calibration.for_part(program), ctx)
        reference = Stream(source, ctx.calibration.for_part(source), ctx)
        offsets: dict[fx.Node, Tensor] = {}
        moved: dict[str, float] = {}
        for call, original in pairs:
            path = module_path(call)
            ctx.progress.step(len(moved), len(pairs), "layers")
            ctx.check_time(f"correcting the bias of {path}")
            stream.advance(call.next)
            reference.advance(original.next)
            wanted, spread = _mean(reference.values(original))
            offset = wanted - _mean(stream.values(call))[0]
            moved[path] = float((offset.abs() / spread.clamp(min=1e-12)).max())
            if moved[path] < self.smallest:
                skipped.append(Skip(path, "its means have hardly moved"))
                continue
            offsets[call] = offset.to(call.meta["val"].dtype)
            stream.shift(call, offsets[call])
        for call, offset in offsets.items():
            _add_to_bias(program, call, offset)
        stats: dict[str, Any] = {"layers": len(offsets), "moved": moved}
        return PassResult(changed=bool(offsets), stats=stats, skipped=skipped)


def _pairs(
    program: Program, source: Program, one: Pass, skipped: list[Skip]
) -> list[tuple[fx.Node, fx.Node]]:
    """The rounded calls of a program with the calls they were in ``source``, in order."""
    before: dict[str, list[fx.Node]] = {}
    for node in source.graph.nodes:
        if node.target in LINEAR:
            before.setdefault(module_path(node), []).append(node)
    now: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _BIAS:
            now.setdefault(module_path(node), []).append(node)
    pairs = []
    for path, calls in now.items():
        originals = before.get(path, [])
        if not one.selects(path) or not _is_rounded(program, source, calls[0], originals):
            continue
        bias = _argument(calls[0])
        if len(calls) != 1 or len(originals) != 1:
            skipped.append(Skip(path, _REPEATED))
        elif bias is not None and program.constant(bias) is None:
            skipped.append(Skip(path, "its bias is computed or in 32-bit codes"))
        elif _is_integer(calls[0]):
            skipped.append(Skip(path, "its integer kernel takes no float bias"))
        else:
            pairs.append((calls[0], originals[0]))
    return pairs


def _is_rounded(program: Program, source: Program, call: fx.Node, originals: list[fx.Node]) -> bool:
    if not originals or call.target not in LINEAR:
        return bool(originals)
    now, then = program.constant(call.args[1]), source.constant(originals[0].args[1])
    return now is None or then is None or not torch.equal(now, then)


def _is_integer(call: fx.Node) -> bool:
    """Whether a linear is computed in integers; a float bias would end that: 3 times the time."""
    weight = call.args[1] if call.target in LINEAR else None
    return isinstance(weight, fx.Node) and weight.target == _mopt.dequantize.default


def _argument(call: fx.Node) -> Any:
    at = _BIAS[call.target]
    return call.args[at] if len(call.args) > at else call.kwargs.get("bias")


def _mean(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of the last axis over all rows, float64."""
    rows = torch.cat([value.detach().reshape(-1, value.shape[-1]) for value in values]).double()
    return rows.mean(0), rows.std(0, correction=0)


def _add_to_bias(program: Program, call: fx.Node, offset: Tensor) -> None:
    old = _argument(call)
    known = program.constant(old)
    path = str(old.target) if known is not None else f"{module_path(call)}.bias"
    total = offset if known is None else known + offset
    stored = program.add_weight(f"{path}_corrected", total, before=call)
    at = _BIAS[call.target]
    call.args = (*call.args[:at], stored, *call.args[at + 1 :])
    call.kwargs = {key: value for key, value in call.kwargs.items() if key != "bias"}
    if known is not None and not old.users:
        program.graph.erase_node(old)
