"""Fold constant scales and shifts into the weights beside them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from mopt.effects import written_nodes
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, register_pass
from mopt.passes.simplify._affine_layers import (
    AffineLayer,
    NewWeights,
    affine_layer,
    erase_unread_weights,
    layer_site,
    readers,
    rounding_problem,
    store,
)
from mopt.passes.simplify._channels import keeps_last_axis, moves_elements
from mopt.passes.simplify._constant_factors import Factors, constant_factors
from mopt.program import Program, module_path, site_of


@register_pass("fold-scale", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class FoldScale(Pass):
    """Fold constant scales and shifts into the linear layer or convolution beside them.

    ## When to use
    After constants are folded: for attention that scales its queries, embeddings times the root of
    the width, layer scale, temperatures, and images normalised inside the model.

    ## Accuracy
    Rounding: for each constant the new weights are computed in float64 and rounded once. A scale
    that the weight's dtype cannot carry without losing precision is left alone.

    ## Limits
    Multiplication, division, addition, subtraction and negation by a number or by one constant per
    channel. The layer before takes them if nothing else reads its output, else the layers after
    take them if nothing else reads the result; a shift cannot cross zero padding. A weight that has
    other readers is left alone. A number may cross reshapes, transposes and idle dropout; channels
    cross what keeps the last axis.

    ## Example
    `linear(x, w, b) * 0.125` becomes `linear(x, w', b')`.
    """

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Fold factors until no sweep over the graph finds another."""
        folded: list[str] = []
        while True:
            found, skipped = self._sweep(program)
            folded += found
            if not found:
                break
        if folded:
            erase_unread_weights(program)
        return PassResult(changed=bool(folded), stats={"folded_into": folded}, skipped=skipped)

    def _sweep(self, program: Program) -> tuple[list[str], list[Skip]]:
        """Fold each constant factor backwards, else forwards; the layers it went into."""
        written = written_nodes(program)
        folded: list[str] = []
        skipped: list[Skip] = []
        for node in program.nodes:
            factors = constant_factors(program, node)
            if factors is None or not self.selects(module_path(node) or node.name):
                continue
            plan = _plan_backward(program, factors)
            if not isinstance(plan, list):
                forward = _plan_forward(program, factors)
                plan = forward if isinstance(forward, list) else plan or forward
            if isinstance(plan, list) and written.intersection([node, *node.all_input_nodes]):
                plan = "its input or its output is written to in place"
            if isinstance(plan, str):
                skipped.append(Skip(site_of(node), plan))
            elif plan:
                folded += [layer_site(layer) for layer, _ in plan]
                node.replace_all_uses_with(factors.source)
                program.graph.erase_node(node)
                for layer, new in plan:
                    store(program, [layer], new, "scaled")
        return folded, skipped


_Plan = list[tuple[AffineLayer, NewWeights]]


def _plan_backward(program: Program, factors: Factors) -> _Plan | str | None:
    """New weights for the layer before; a reason if it cannot take them; None if there is none."""
    node, crossed = factors.source, False
    while (layer := affine_layer(program, node)) is None:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or not _crosses(node, before, factors):
            return None
        if len(node.users) != 1:
            return None
        node, crossed = before, True
    if len(node.users) != 1:
        return f"the output of layer {layer_site(layer)!r} before it has other readers"
    if readers(program, layer.weight_node) != [node]:
        return f"weight {str(layer.weight_node.target)!r} before it is shared with other readers"
    per_channel = _per_channel(factors, layer, crossed, layer.out_channels)
    if per_channel is None:
        return f"its constant is not one per channel of layer {layer_site(layer)!r} before it"
    new = layer.fold_into_output(*per_channel)
    return factors.problem() or rounding_problem(layer, new) or [(layer, new)]


def _plan_forward(program: Program, factors: Factors) -> _Plan | str | None:
    """New weights for all the layers after; a reason if one cannot take them; None if none is."""
    plan: _Plan = []
    others: list[str] = []
    waiting = [(factors.node, False)]
    while waiting:
        node, crossed = waiting.pop()
        for user in node.users:
            layer = affine_layer(program, user)
            if layer is None or layer.is_embedding or layer.input_node is not node:
                if _crosses(user, node, factors):
                    waiting.append((user, True))
                else:
                    others.append("an output" if user.op == "output" else str(user.target))
                continue
            found = _fold_forward(program, factors, layer, crossed)
            if isinstance(found, str):
                return found
            plan.append((layer, found))
    if plan and others:
        return f"it is read by {others[0]} besides layer {layer_site(plan[0][0])!r}"
    return factors.problem() or plan if plan else None


def _fold_forward(
    program: Program, factors: Factors, layer: AffineLayer, crossed: bool
) -> NewWeights | str:
    site = layer_site(layer)
    if readers(program, layer.weight_node) != [layer.call]:
        return f"weight {str(layer.weight_node.target)!r} after it is shared with other readers"
    per_channel = _per_channel(factors, layer, crossed, layer.in_channels)
    if per_channel is None:
        return f"its constant is not one per channel of layer {site!r} after it"
    scale, shift = per_channel
    if layer.pads_with_zeros and bool(shift.any()):
        return f"layer {site!r} after it pads its input with zeros, which a shift would move"
    new = layer.fold_into_input(scale, shift)
    return rounding_problem(layer, new) or new


def _per_channel(
    factors: Factors, layer: AffineLayer, crossed: bool, channels: int
) -> tuple[Tensor, Tensor] | None:
    """The constants per channel of a layer, which may be some operators away."""
    if crossed and not factors.is_number and layer.channel_axis != -1:
        return None  # only the last axis is followed across other operators
    return factors.per_channel(layer.channel_axis, channels)


def _crosses(node: fx.Node, source: fx.Node, factors: Factors) -> bool:
    """Whether scaling before or after ``node``, which reads ``source``, is the same."""
    if node.op != "call_function" or not node.args or node.args[0] is not source:
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if before.dtype != after.dtype:
        return False
    if factors.is_number:
        return moves_elements(node)
    return factors.is_on_last_axis and keeps_last_axis(node, source)
