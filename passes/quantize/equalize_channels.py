"""Even out the ranges of channels between neighbouring layers (cross-layer equalization)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mopt.effects import argument
from mopt.formats.base import require_finite
from mopt.layers import LINEAR
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, option, register_pass
from mopt.program import Program, module_path, site_of

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)
_HOMOGENEOUS = (_aten.relu.default, _aten.relu_.default, _aten.leaky_relu.default)
_SETTLED = 1e-3


@register_pass("equalize-channels", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class EqualizeChannels(Pass):
    """Even out the ranges of channels between neighbouring convolutions or linear layers.

    ## When to use
    Before int8 with one scale per tensor, on networks whose channels differ much in range, such as
    those with depthwise convolutions. No data is needed. Batch norms must be folded before.

    ## Accuracy
    Rounding: the function stays, factors are folded in float64 and rounded once. For each channel
    i between two layers the factor is sqrt(r1 r2) / r2 with r1 and r2 its largest weights before
    and behind (Nagel et al. 2019, "Data-Free Quantization", eq. 11), repeated until no factor
    moves by more than 0.1 percent.

    ## Limits
    The two layers must follow each other directly or through relu or leaky relu, and the value
    between them must have no other reader. relu6, hard swish and the like stand in the way.
    Transposed convolutions and shared weights are left alone.

    ## Example
    A channel with weights up to 8 before and up to 0.5 behind gets weights up to 2 in both.
    """

    sweeps: int = option(20, min=1, max=100, help="most rounds over all pairs of layers")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        pairs, skipped = _find_pairs(program, self)
        weights: dict[fx.Node, Tensor] = {}
        biases: dict[fx.Node, Tensor] = {}
        for call in dict.fromkeys(call for pair in pairs for call in pair):
            weight = program.constant(call.args[1])
            assert weight is not None
            require_finite(weight, module_path(call))
            weights[call] = weight.double()
            bias = program.constant(argument(call, "bias"))
            if bias is not None:
                biases[call] = bias.double()
        moved: dict[fx.Node, bool] = {}
        for _ in range(self.sweeps):
            ctx.check_time("equalizing channels")
            largest = 0.0
            for first, second in pairs:
                factors = _factors(weights[first], weights[second], _groups(second))
                change = float((factors - 1).abs().max())
                if change <= _SETTLED:
                    continue
                largest = max(largest, change)
                weights[first] = weights[first] / _per_row(factors, weights[first])
                if first in biases:
                    biases[first] = biases[first] / factors
                weights[second] = _scale_inputs(weights[second], factors, _groups(second))
                moved[first] = moved[second] = True
            if largest <= _SETTLED:
                break
        for call in moved:
            _replace(program, call, 1, weights[call])
            if call in biases:
                _replace(program, call, 2, biases[call])
        stats = {"pairs": len(pairs), "layers": len(moved)}
        return PassResult(changed=bool(moved), stats=stats, skipped=skipped)


def _find_pairs(program: Program, one: Pass) -> tuple[list[tuple[fx.Node, fx.Node]], list[Skip]]:
    pairs, skipped = [], []
    for node in program.nodes:
        if not _is_layer(program, node) or not one.selects(module_path(node)):
            continue
        value = node
        while len(value.users) == 1 and next(iter(value.users)).target in _HOMOGENEOUS:
            value = next(iter(value.users))
        readers = list(value.users)
        if len(readers) != 1 or not _is_layer(program, readers[0]) or readers[0].args[0] != value:
            if readers and any(user.op != "output" for user in readers):
                name = next(str(u.target) for u in readers if u.op != "output")
                reason = f"its output is read by {name}" + (
                    " and others" if len(readers) > 1 else ""
                )
                skipped.append(Skip(site_of(node), reason))
            continue
        second = readers[0]
        shared = [call for call in (node, second) if _readers(program, call) != 1]
        if shared:
            skipped.append(Skip(site_of(shared[0]), "its weight has other readers"))
        elif one.selects(module_path(second)):
            pairs.append((node, second))
    return pairs, skipped


def _is_layer(program: Program, node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (*LINEAR, *_CONVOLUTIONS):
        return False
    bias = argument(node, "bias")
    return program.constant(node.args[1]) is not None and (
        bias is None or program.constant(bias) is not None
    )


def _readers(program: Program, call: fx.Node) -> int:
    weight = program.constant(call.args[1])
    assert weight is not None
    return sum(
        len(node.users) for node in program.graph.nodes
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)
        and program.weight(node).untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    )  # fmt: skip


def _groups(call: fx.Node) -> int:
    return 1 if call.target in LINEAR else int(argument(call, "groups"))


def _factors(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """sqrt(r1 r2) / r2 per channel; 1 where a channel has no weights on one side."""
    before = first.flatten(1).abs().amax(1)
    grouped = second.flatten(2) if second.dim() > 2 else second.unsqueeze(2)
    behind = grouped.unflatten(0, (groups, -1)).abs().amax((1, 3)).flatten()
    sound = (before > 0) & (behind > 0)
    return torch.where(sound, (before / behind.clamp(min=1e-300)).sqrt(), torch.ones_like(before))


def _scale_inputs(weight: Tensor, factors: Tensor, groups: int) -> Tensor:
    parts = weight.unflatten(0, (groups, -1))
    shape = (groups, 1, -1, *[1] * (weight.dim() - 2))
    return (parts * factors.reshape(shape)).flatten(0, 1)


def _per_row(factors: Tensor, weight: Tensor) -> Tensor:
    return factors.reshape(-1, *[1] * (weight.dim() - 1))


def _replace(program: Program, call: fx.Node, at: int, tensor: Tensor) -> None:
    old = call.args[at]
    assert isinstance(old, fx.Node)
    stored = tensor.to(program.weight(old).dtype)
    call.update_arg(at, program.add_weight(f"{old.target}_equalized", stored, call))
    if not old.users:
        program.graph.erase_node(old)
