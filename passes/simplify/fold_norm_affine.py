"""Fold gamma and beta of a normalisation into the linear layers after it."""

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
from mopt.passes.simplify._channels import keeps_last_axis
from mopt.passes.simplify._rms_pattern import rms_scale
from mopt.program import Program, module_path, site_of

_LAYER_NORM = torch.ops.aten.layer_norm.default
_RMS_NORM = torch.ops.aten.rms_norm.default


@register_pass("fold-norm-affine", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class FoldNormAffine(Pass):
    """Fold gamma and beta of layer norm and RMS norm into the linear layers that follow.

    ## When to use
    Before methods that rotate or rescale the activations between norm and linear layers: a norm
    without gamma commutes with a rotation. By itself it saves little time.

    ## Accuracy
    Rounding: W' = W * gamma (along the input) and b' = b + W beta, computed in float64 and rounded
    once. A linear layer without bias gets one if beta is not zero.

    ## Limits
    Every reader of the norm must be a linear layer with a weight of its own, reached directly or
    through operators that keep the last axis (casts, reshapes, dropout in eval mode). RMS norm is
    recognised as one operator and as written out: x * rsqrt(mean(x^2) + eps) * gamma. A norm over
    several axes is left alone.

    ## Example
    `linear(layer_norm(x, gamma, beta), w, b)` becomes `linear(layer_norm(x), w', b')`.
    """

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Fold each norm that has a gamma or a beta, or say why not."""
        folded, skipped = 0, []
        for node in program.nodes:
            if node._erased or not self.selects(module_path(node) or node.name):
                continue
            norm = _find_norm(program, node)
            if norm is None:
                continue
            problem = norm if isinstance(norm, str) else _fold(program, norm)
            if problem:
                skipped.append(Skip(site_of(node), problem))
            else:
                folded += 1
        if folded:
            erase_unread_weights(program)
        return PassResult(changed=bool(folded), stats={"folded": folded}, skipped=skipped)


@dataclass(frozen=True)
class _Norm:
    """A normalisation: ``last`` is its result, ``gamma`` and ``beta`` are float64 or None."""

    last: fx.Node
    gamma: Tensor | None
    beta: Tensor | None


def _find_norm(program: Program, node: fx.Node) -> _Norm | str | None:
    """The norm that ends at a node; a reason if it cannot be folded; None if there is none."""
    if node.target not in (_LAYER_NORM, _RMS_NORM):
        gamma = rms_scale(program, node)
        return None if gamma is None else _Norm(node, gamma.double(), None)
    parameters = []
    for name in ("weight", "bias"):
        value = argument(node, name)
        tensor = program.constant(value)
        if value is not None and tensor is None:
            return f"its {name} is computed from the inputs"
        parameters.append(None if tensor is None else tensor.double())
    gamma, beta = parameters
    if gamma is None and beta is None:
        return None
    shape = argument(node, "normalized_shape")
    if len(shape) != 1:
        return f"it normalises over {len(shape)} axes, linear layers read the last one only"
    return _Norm(node, gamma, beta)


def _fold(program: Program, norm: _Norm) -> str | None:
    """Fold a norm, or return why that is not possible."""
    layers = _linear_readers(program, norm.last)
    if isinstance(layers, str):
        return layers
    is_written_out = norm.last.target not in (_LAYER_NORM, _RMS_NORM)
    if is_written_out and written_nodes(program).intersection(norm.last.all_input_nodes):
        return "the normalised value is written to in place"
    plans: list[tuple[AffineLayer, NewWeights]] = []
    for layer in layers:
        width = layer.in_channels
        gamma = torch.ones(1, dtype=torch.float64) if norm.gamma is None else norm.gamma
        beta = torch.zeros(width, dtype=torch.float64) if norm.beta is None else norm.beta
        new = layer.fold_into_input(gamma, beta)
        problem = rounding_problem(layer, new)
        if problem:
            return problem
        plans.append((layer, new))
    _drop_affine(program, norm.last)
    for layer, new in plans:
        store(program, [layer], new, "norm")
    return None


def _linear_readers(program: Program, norm: fx.Node) -> list[AffineLayer] | str:
    """Every linear layer a norm feeds, or the reader that is none."""
    layers: list[AffineLayer] = []
    waiting = [norm]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            layer = affine_layer(program, user)
            if layer is not None and layer.is_linear and layer.input_node is node:
                if readers(program, layer.weight_node) != [user]:
                    return f"weight {str(layer.weight_node.target)!r} is shared with other readers"
                layers.append(layer)
            elif keeps_last_axis(user, node):
                waiting.append(user)
            else:
                what = "an output of the model" if user.op == "output" else str(user.target)
                return f"it is also read by {what}, which is not a linear layer"
    return layers or "nothing reads it"


def _drop_affine(program: Program, last: fx.Node) -> None:
    """Take gamma and beta out of a norm."""
    if last.target is _LAYER_NORM:
        x, shape, eps = last.args[0], last.args[1], argument(last, "eps")
        program.replace_call(last, _LAYER_NORM, (x, shape, None, None, eps))
    elif last.target is _RMS_NORM:
        x, shape, eps = last.args[0], last.args[1], argument(last, "eps")
        program.replace_call(last, _RMS_NORM, (x, shape, None, eps))
    else:  # gamma * normalised
        left, right = last.args
        is_left_gamma = program.constant(left) is not None
        source = right if is_left_gamma else left
        assert isinstance(source, fx.Node)
        last.replace_all_uses_with(source)
        program.graph.erase_node(last)
