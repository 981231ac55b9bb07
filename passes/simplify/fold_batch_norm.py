"""Fold batch normalisation into the layer beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mopt.effects import argument, written_nodes
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, register_pass
from mopt.passes.simplify._affine_layers import (
    AffineLayer,
    NewWeights,
    affine_layer,
    erase_unread_weights,
    readers,
    rounding_problem,
    store,
)
from mopt.program import Program, iter_calls, module_path, site_of

_BATCH_NORM = torch.ops.aten.batch_norm.default


@register_pass("fold-batch-norm", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """Fold batch normalisation into the convolution or linear layer beside it.

    ## When to use
    Always, for inference: a batch norm in eval mode is a scale and a shift per channel, and the
    layer before it already applies both. Do it before quantization, which would round twice.

    ## Accuracy
    Rounding: the new weights are computed in float64 and rounded once to the layer's dtype. With
    v the running variance: W' = W * gamma / sqrt(v + eps), b' = beta + (b - mean) * gamma /
    sqrt(v + eps). A batch norm without a layer before it goes into the layers after it instead, if
    nothing else reads it and none of them pads its input.

    ## Limits
    The layer's output must have no other reader. A weight used by several calls is folded if each
    of them is followed by the same batch norm. Batch norm in training mode is left alone, and so is
    one with no layer on either side: as one operator it is as cheap as a scale and a shift.

    ## Example
    `batch_norm(conv2d(x, w), gamma, beta, mean, var)` becomes `conv2d(x, w', b')`.
    """

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Fold each batch norm backwards, else forwards, else say why not."""
        folded, skipped = 0, []
        for node in iter_calls(program, _BATCH_NORM):
            if node._erased or not self.selects(module_path(node) or node.name):
                continue
            found = _plan(program, node)
            if isinstance(found, str):
                skipped.append(Skip(site_of(node), found))
                continue
            folded += found.apply(program)
        if folded:
            erase_unread_weights(program)
        return PassResult(changed=bool(folded), stats={"folded": folded}, skipped=skipped)


@dataclass(frozen=True)
class _Fold:
    """Batch norms with the same numbers, and new weights for groups of layers."""

    norms: list[fx.Node]
    groups: list[tuple[list[AffineLayer], NewWeights]]

    def apply(self, program: Program) -> int:
        """Give the layers their new weights and drop the norms; returns how many."""
        normal = _output_moments(program, self.norms[0])
        sources = [norm.args[0] for norm in self.norms]
        for norm in self.norms:
            source = norm.args[0]
            assert isinstance(source, fx.Node)
            norm.replace_all_uses_with(source)
            program.graph.erase_node(norm)
        for layers, new in self.groups:
            is_before = all(layer.call in sources for layer in layers)
            for call in store(program, layers, new, "bn"):
                if is_before and normal is not None:
                    call.meta["normal_output"] = normal  # what data-free passes use
        return len(self.norms)


def _plan(program: Program, norm: fx.Node) -> _Fold | str:
    """How to fold a batch norm, or the reason why it stays."""
    if argument(norm, "training"):
        return "it is in training mode: it normalises with the statistics of the batch"
    factors = _scale_and_shift(program, norm)
    if isinstance(factors, str):
        return factors
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    layer = affine_layer(program, source)
    if layer is None or layer.is_embedding:
        return _plan_forward(program, norm, *factors)
    return _plan_backward(program, norm, layer, *factors)


def _output_moments(program: Program, norm: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation per channel that a batch norm gives: beta and the size of gamma."""
    mean, deviation = (program.constant(argument(norm, name)) for name in ("bias", "weight"))
    if mean is None or deviation is None:
        return None
    return mean.double(), deviation.double().abs()


def _scale_and_shift(program: Program, norm: fx.Node) -> tuple[Tensor, Tensor] | str:
    """The batch norm as y = x * scale + shift, float64, or what is wrong with its numbers."""
    mean = program.constant(argument(norm, "running_mean"))
    variance = program.constant(argument(norm, "running_var"))
    if mean is None or variance is None:
        return "its running statistics are not weights"
    scale = torch.rsqrt(variance.double() + float(argument(norm, "eps")))
    shift = -mean.double() * scale
    gamma, beta = argument(norm, "weight"), argument(norm, "bias")
    for parameter in (gamma, beta):
        if parameter is not None and program.constant(parameter) is None:
            return "its weight or its bias is computed from the inputs"
    if gamma is not None:
        value = program.weight(gamma).double()
        scale, shift = scale * value, shift * value
    if beta is not None:
        shift = shift + program.weight(beta).double()
    if not bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        return "its running statistics give NaN or infinity"
    return scale, shift


def _plan_backward(
    program: Program, norm: fx.Node, layer: AffineLayer, scale: Tensor, shift: Tensor
) -> _Fold | str:
    if layer.is_linear and layer.call.meta["val"].dim() != 2:
        return "the linear layer before it has channels on the last axis, batch norm on axis 1"
    norms, layers = [], []
    for reader in readers(program, layer.weight_node):
        other = affine_layer(program, reader)
        if other is None or other.weight_node.target != layer.weight_node.target:
            return f"weight {str(layer.weight_node.target)!r} has other readers than this layer"
        following = list(reader.users)
        if len(following) != 1 or not _same_numbers(following[0], norm):
            return (
                "the output of the layer before it has other readers"
                if reader is layer.call
                else f"weight {str(layer.weight_node.target)!r} is shared by calls that are not "
                "all followed by the same batch norm"
            )
        if argument(reader, "bias") is not argument(layer.call, "bias"):
            return f"weight {str(layer.weight_node.target)!r} is shared by calls with other biases"
        norms.append(following[0])
        layers.append(other)
    new = layer.fold_into_output(scale, shift)
    return rounding_problem(layer, new) or _Fold(norms, [(layers, new)])


def _same_numbers(node: fx.Node, norm: fx.Node) -> bool:
    """Whether a node is a batch norm with the parameters of ``norm``, on its input's channels."""
    if node.target is not _BATCH_NORM:
        return False
    names = ("weight", "bias", "running_mean", "running_var", "training", "eps")
    return all(argument(node, name) == argument(norm, name) for name in names)


def _plan_forward(program: Program, norm: fx.Node, scale: Tensor, shift: Tensor) -> _Fold | str:
    if norm.args[0] in written_nodes(program):
        return "there is no layer before it, and its input is written to in place"
    groups: list[tuple[list[AffineLayer], NewWeights]] = []
    for user in norm.users:
        layer = affine_layer(program, user)
        if layer is None or layer.is_embedding or layer.input_node is not norm:
            return "there is no layer before it, and not all of its readers are layers"
        if norm.meta["val"].dim() + layer.channel_axis != 1:
            return "there is no layer before it, and one after it has channels on another axis"
        if layer.pads_with_zeros and bool(shift.any()):
            return "there is no layer before it, and one after it pads its input with zeros"
        if len(readers(program, layer.weight_node)) != 1:
            return f"weight {str(layer.weight_node.target)!r} of a layer after it is shared"
        new = layer.fold_into_input(scale, shift)
        problem = rounding_problem(layer, new)
        if problem:
            return problem
        groups.append(([layer], new))
    if not groups:
        return "there is no layer before it, and nothing reads it"
    return _Fold([norm], groups)
