"""Layers of the form weight times input plus bias, and folding scales and shifts into them.

Everything is computed in float64 and rounded once, to the dtype the weight had.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mopt.effects import argument
from mopt.layers import CONVOLUTIONS, EMBEDDING, LINEAR
from mopt.program import Program, module_path

_aten = torch.ops.aten
_TRANSPOSED = (
    _aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input,
)  # fmt: skip


@dataclass(frozen=True)
class NewWeights:
    """Weight and bias in float64; no bias stays no bias."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class AffineLayer:
    """One call of a linear layer, a convolution or an embedding with constant weights."""

    call: fx.Node
    weight: Tensor
    bias: Tensor | None
    groups: int
    is_transposed: bool

    @property
    def is_embedding(self) -> bool:
        """Whether the call looks rows up: it has no input to scale and no bias."""
        return self.call.target in EMBEDDING

    @property
    def is_linear(self) -> bool:
        """Whether channels are the last axis of input and output."""
        return self.call.target in LINEAR

    @property
    def channel_axis(self) -> int:
        """The axis of input and output that holds the channels, counted from the end."""
        return -1 if self.is_linear or self.is_embedding else 1 - self.weight.dim()

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        if self.is_embedding:
            return self.weight.shape[1]
        return self.weight.shape[1] * self.groups if self.is_transposed else self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.weight.shape[0] if self.is_transposed else self.weight.shape[1] * self.groups

    @property
    def weight_node(self) -> fx.Node:
        """The node that reads the weight."""
        node = self.call.args[0 if self.is_embedding else 1]
        assert isinstance(node, fx.Node)
        return node

    @property
    def input_node(self) -> fx.Node:
        """The node whose value the layer is applied to."""
        node = self.call.args[1 if self.is_embedding else 0]
        assert isinstance(node, fx.Node)
        return node

    @property
    def pads_with_zeros(self) -> bool:
        """Whether zeros from outside the input enter the sum, so that a shift cannot be folded."""
        if self.is_linear or self.is_embedding:
            return False
        padding = argument(self.call, "padding")
        if isinstance(padding, str):
            return padding != "valid"
        if self.is_transposed:  # its border outputs see fewer taps whatever the padding is
            return True
        widths = padding if isinstance(padding, list | tuple) else [padding]
        return any(width != 0 for width in widths)

    def fold_into_output(self, scale: Tensor, shift: Tensor) -> NewWeights:
        """Weights that give what ``output * scale + shift`` gives now.

        Both are float64 with one value or one per output channel.
        """
        weight = self.weight.double()
        if self.is_embedding:
            return NewWeights(weight * scale + shift, None)
        if scale.numel() == 1:
            weight = weight * scale.reshape(())
        elif self.is_transposed:
            weight = self._scale_second_axis(scale)
        else:
            weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        if self.bias is None and not bool(shift.any()):
            return NewWeights(weight, None)
        return NewWeights(weight, self._bias_or_zeros() * scale + shift)

    def fold_into_input(self, scale: Tensor, shift: Tensor) -> NewWeights:
        """Weights that do to an input x what the layer does to ``x * scale + shift`` now.

        Both are float64 with one value or one per input channel. A shift must not meet padding.
        """
        weight = self.weight.double()
        if scale.numel() == 1:
            weight = weight * scale.reshape(())
        elif self.is_transposed:
            weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        else:
            weight = self._scale_second_axis(scale)
        if not bool(shift.any()):
            return NewWeights(weight, None if self.bias is None else self.bias.double())
        assert not self.pads_with_zeros
        taps = self.weight.double().flatten(2).sum(-1) if self.weight.dim() > 2 else self.weight
        grouped = taps.double().unflatten(0, (self.groups, -1))  # (groups, out, in)
        full = shift.reshape(-1).expand(self.in_channels).reshape(self.groups, -1, 1)
        return NewWeights(weight, self._bias_or_zeros() + (grouped @ full).flatten())

    def _scale_second_axis(self, scale: Tensor) -> Tensor:
        """The weight with its second axis, which counts within a group, scaled over all groups."""
        grouped = self.weight.double().unflatten(0, (self.groups, -1))
        factors = scale.reshape(self.groups, 1, -1, *[1] * (self.weight.dim() - 2))
        return (grouped * factors).flatten(0, 1)

    def _bias_or_zeros(self) -> Tensor:
        if self.bias is None:
            return torch.zeros(self.out_channels, dtype=torch.float64, device=self.weight.device)
        return self.bias.double()


def affine_layer(program: Program, node: fx.Node) -> AffineLayer | None:
    """The layer a call is, if its weight and bias are plain floating-point tensors."""
    if node.op != "call_function":
        return None
    if node.target in EMBEDDING:
        weight, bias = program.constant(node.args[0]), None
    elif node.target in LINEAR or node.target in CONVOLUTIONS:
        weight = program.constant(node.args[1])
        bias_argument = argument(node, "bias")
        bias = program.constant(bias_argument)
        if bias_argument is not None and bias is None:
            return None
    else:
        return None
    if weight is None or not weight.is_floating_point() or weight.dim() < 2:
        return None
    groups = 1
    if node.target in CONVOLUTIONS:
        groups = int(argument(node, "groups"))
        if node.meta["val"].dim() != weight.dim():  # an input without a batch axis
            return None
    return AffineLayer(node, weight, bias, groups, node.target in _TRANSPOSED)


def readers(program: Program, weight: fx.Node) -> list[fx.Node]:
    """Every node that reads the memory of a weight, under whatever name."""
    storage = program.weight(weight).untyped_storage()._cdata
    return [
        user
        for node in program.graph.nodes
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)
        and program.weight(node).untyped_storage()._cdata == storage
        for user in node.users
    ]  # fmt: skip


def rounding_problem(layer: AffineLayer, new: NewWeights) -> str | None:
    """Why new values do not fit into the layer's dtype, or None.

    Rounding normal numbers costs at most half an epsilon of their length; more means that values
    underflowed.
    """
    dtype = layer.weight.dtype
    for tensor in (new.weight, new.bias):
        if tensor is None:
            continue
        rounded = tensor.to(dtype).double()
        if not bool(torch.isfinite(rounded).all()):
            return f"the folded weight does not fit into {dtype}"
        if float((rounded - tensor).norm()) > torch.finfo(dtype).eps * float(tensor.norm()):
            return f"the folded weight is too small for {dtype} and would lose precision"
    return None


def store(program: Program, layers: list[AffineLayer], new: NewWeights, note: str) -> list[fx.Node]:
    """Make all calls use one new weight and bias; returns the new calls.

    The old weights stay where others read them. ``note`` goes into the names of the new ones.
    """
    first = min(layers, key=lambda layer: _position(program, layer.call))
    path = re.sub(rf"_{note}(_\d+)?$", "", str(first.weight_node.target))
    weight = program.add_weight(f"{path}_{note}", _rounded(new.weight, first), first.call)
    bias = None
    if new.bias is not None:
        owner = path.rpartition(".")[0]
        name = f"bias_{note}" if not owner else f"{owner}.bias_{note}"
        bias = program.add_weight(name, _rounded(new.bias, first), first.call)
    return [_replace(program, layer, weight, bias) for layer in layers]


def _rounded(tensor: Tensor, layer: AffineLayer) -> Tensor:
    """In the dtype and the memory layout of the layer's weight."""
    tensor = tensor.to(layer.weight.dtype)
    if tensor.shape != layer.weight.shape:
        return tensor.contiguous()
    return torch.empty_like(layer.weight).copy_(tensor)


def _replace(
    program: Program, layer: AffineLayer, weight: fx.Node, bias: fx.Node | None
) -> fx.Node:
    assert isinstance(layer.call.target, torch._ops.OpOverload)
    new = {"weight": weight, "bias": bias}
    names = [parameter.name for parameter in layer.call.target._schema.arguments]
    values = [new[name] if name in new else argument(layer.call, name) for name in names]
    return program.replace_call(layer.call, layer.call.target, tuple(values))


def erase_unread_weights(program: Program) -> None:
    """Drop the weights that folding has left without a reader."""
    for node in program.nodes:
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)


def _position(program: Program, wanted: fx.Node) -> int:
    return next(i for i, node in enumerate(program.graph.nodes) if node is wanted)


def layer_site(layer: AffineLayer) -> str:
    """The module path of a layer, or its node."""
    return module_path(layer.call) or layer.call.name
