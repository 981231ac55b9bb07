"""Finds the operators of a graph that have a kernel, and puts kernel layers in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.backends.triton.layers import CodesLinear, DynamicInt8Linear, KernelLayer
from mopt.backends.triton.planes import pack_blocks, pack_levels

_aten, _mopt = torch.ops.aten, torch.ops.mopt
# A tile along K must hold a whole group; longer ones would not fit the chip's registers.
LONGEST_GROUP = 128
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Site:
    """A call that a kernel can take.

    ``make(limit)`` packs its weight and gives the layer, ``reference(x, limit)`` is what the layer
    means; with a limit only so many of the outputs, 0 for all.
    """

    node: fx.Node
    value: fx.Node
    make: Callable[[int], KernelLayer]
    reference: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Left:
    """A call that stays with PyTorch although it is compressed, and why."""

    node: fx.Node
    reason: str


def find_sites(module: fx.GraphModule) -> tuple[list[Site], list[Left]]:
    """The calls that have a kernel, and compressed ones that have none."""
    sites: list[Site] = []
    left: list[Left] = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        finder = _FINDERS.get(node.target)
        if finder is None:
            continue
        found = finder(module, node)
        if isinstance(found, Site):
            sites.append(found)
        elif found is not None:
            left.append(Left(node, found))
    return sites, left


def replace(module: fx.GraphModule, sites: list[Site]) -> list[KernelLayer]:
    """Put the layers of the sites into the graph, which then reads the old weights no more."""
    layers = []
    for index, site in enumerate(sites):
        layer = site.make(0)
        name = f"kernel_{index}"
        module.add_submodule(name, layer)
        with module.graph.inserting_before(site.node):
            call = module.graph.call_module(name, (site.value,))
        call.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(call)
        module.graph.erase_node(site.node)
        layers.append(layer)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers(recurse=False) if name not in read]:
        delattr(module, name)
    module.recompile()
    return layers


def _constant(module: fx.GraphModule, argument: Any) -> Tensor | None:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    owner: Any = module
    for part in str(argument.target).split("."):
        owner = getattr(owner, part)
    return owner if isinstance(owner, Tensor) else None


def _all_constant(module: fx.GraphModule, arguments: tuple[Any, ...]) -> list[Tensor | None] | None:
    """The tensors behind arguments that are weights or None; None where one is computed."""
    found = [_constant(module, argument) for argument in arguments]
    computed = any(isinstance(a, fx.Node) and f is None
                   for a, f in zip(arguments, found, strict=True))  # fmt: skip
    return None if computed else found


def _linear_nbits(module: fx.GraphModule, node: fx.Node) -> Site | str:
    x, *weights, bits, columns, _ = node.args
    tensors = _all_constant(module, tuple(weights))
    if tensors is None:
        return "the weight is computed, not stored"
    codes, scales, _, _ = tensors
    assert codes is not None and scales is not None
    assert isinstance(bits, int) and isinstance(columns, int) and isinstance(x, fx.Node)
    group = codes.shape[2] * 8 // bits
    if group > LONGEST_GROUP:
        return f"groups of {group} columns, kernels take up to {LONGEST_GROUP}"
    if scales.dtype not in _DTYPES:
        return f"scales in {scales.dtype}"

    def make(limit: int) -> KernelLayer:
        c, s, z, b = _first(tensors, limit)
        assert c is not None and s is not None
        return CodesLinear(pack_blocks(c, s, z, bits, columns), b)

    def reference(values: Tensor, limit: int) -> Tensor:
        operands = _first(tensors, limit)
        return _mopt.linear_nbits.default(values, *operands, bits, columns, "float")

    return Site(node, x, make, reference)


def _linear(module: fx.GraphModule, node: fx.Node) -> Site | str | None:
    x, weight = node.args[:2]
    if not (isinstance(weight, fx.Node) and weight.target is _mopt.decode_levels.default):
        return None
    *stored, kind, scale_kind, columns = weight.args
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    tensors = _all_constant(module, (*stored, bias))
    if tensors is None:
        return "the weight is computed, not stored"
    codes, scales, tensor_scale = tensors[0], tensors[1], tensors[3]
    assert codes is not None and scales is not None
    assert isinstance(columns, int) and isinstance(x, fx.Node)
    group = codes.shape[2] * 8 // {"e4m3": 8, "e5m2": 8}.get(str(kind), 4)
    if codes.shape[1] > 1 and group > LONGEST_GROUP:
        return f"groups of {group} columns, kernels take up to {LONGEST_GROUP}"

    rest = (tensor_scale, str(kind), str(scale_kind), columns)

    def make(limit: int) -> KernelLayer:
        c, s, t, _, b = _first(tensors, limit)
        assert c is not None and s is not None
        return CodesLinear(pack_levels(c, s, t, *rest), b)

    def reference(values: Tensor, limit: int) -> Tensor:
        c, s, t, _, b = _first(tensors, limit)
        decoded = _mopt.decode_levels.default(c, s, t, *rest)
        return torch.nn.functional.linear(values, decoded.to(values.dtype), b)

    return Site(node, x, make, reference)


def _first(tensors: list[Tensor | None], limit: int) -> list[Tensor | None]:
    """The first ``limit`` rows of tensors that have one for every output; scalars as they are."""
    return [t[:limit] if limit and t is not None and t.dim() else t for t in tensors]


def _linear_dynamic_int8(module: fx.GraphModule, node: fx.Node) -> Site | str:
    x, *weights = node.args
    tensors = _all_constant(module, tuple(weights))
    if tensors is None:
        return "the weight is computed, not stored"
    assert isinstance(x, fx.Node)

    def make(limit: int) -> KernelLayer:
        codes, scales, bias = _first(tensors, limit)
        assert codes is not None and scales is not None
        return DynamicInt8Linear(codes, scales, bias)

    def reference(values: Tensor, limit: int) -> Tensor:
        return _mopt.linear_dynamic_int8.default(values, *_first(tensors, limit))

    return Site(node, x, make, reference)


_Finder = Callable[[fx.GraphModule, fx.Node], Site | str | None]
_FINDERS: dict[Any, _Finder] = {
    _mopt.linear_nbits.default: _linear_nbits,
    _mopt.linear_dynamic_int8.default: _linear_dynamic_int8,
    _aten.linear.default: _linear,
}
