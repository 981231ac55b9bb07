"""Chains of point-wise operators, reductions and views, handed to a compiler as one piece.

What has no kernel of mopt's own runs through Inductor where at least two such operators follow each
other; products, lookups and mopt's own operators stay single calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner, Partition
from torch.fx.passes.operator_support import OperatorSupportBase

import mopt.ops  # noqa: F401 - defines the operators below
from mopt.backends.triton.values import value_of

_aten = torch.ops.aten
VIEWS = frozenset({
    _aten.view.default, _aten.reshape.default, _aten.transpose.int, _aten.permute.default,
    _aten.unflatten.int, _aten.flatten.using_ints, _aten.unsqueeze.default, _aten.slice.Tensor,
    _aten.expand.default, _aten.chunk.default, _aten.select.int, _aten.squeeze.dim,
    _aten.detach.default, _aten.alias.default, _aten.t.default,
})  # fmt: skip
# Beside everything that PyTorch itself tags as point-wise.
_FUSIBLE = VIEWS - {_aten.chunk.default} | {
    _aten.softmax.int, _aten._softmax.default, _aten.layer_norm.default, _aten.rms_norm.default,
    _aten.mean.dim, _aten.sum.dim_IntList, _aten.amax.default, _aten.amin.default,
    _aten.var.correction, _aten.cat.default, _aten.stack.default, _aten.group_norm.default,
    _aten.linalg_vector_norm.default,
}  # fmt: skip
_UNSAFE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
)
# Operators of mopt's own that a compiler cannot look into: written out where they have one scale.
_OPENED = (torch.ops.mopt.quantize.default, torch.ops.mopt.dequantize.default)

Compile = Callable[..., Callable[..., Any]]


def is_fusible(node: fx.Node) -> bool:
    """Whether a call may be part of a chain: it writes nothing, and its shape is known before."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    if target in _OPENED:
        scale = value_of(node.args[1])
        return scale is not None and scale.dim() == 0
    if target._schema.is_mutable or any(tag in target.tags for tag in _UNSAFE):
        return False
    return target in _FUSIBLE or (target.namespace == "aten" and torch.Tag.pointwise in target.tags)


class _Support(OperatorSupportBase):
    def __init__(self, without: Collection[fx.Node]) -> None:
        self._without = without

    def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
        return node not in self._without and is_fusible(node)


def _partitioned(
    module: fx.GraphModule, without: Collection[fx.Node]
) -> tuple[CapabilityBasedPartitioner, list[Partition]]:
    """Those with at least two operators that compute."""
    made = CapabilityBasedPartitioner(module, _Support(without), allows_single_node_partition=False)
    found = [p for p in made.propose_partitions()
             if sum(node.target not in VIEWS for node in p.nodes) >= 2]  # fmt: skip
    return made, found


def chained_calls(module: fx.GraphModule, without: Collection[fx.Node]) -> set[fx.Node]:
    """The calls that chains would take when those in ``without`` have kernels of their own."""
    return {node for partition in _partitioned(module, without)[1] for node in partition.nodes}


class Chain(nn.Module):
    """A piece of a graph, compiled when it is first called; ``failure`` says why it is not."""

    def __init__(self, piece: nn.Module, compile: Compile) -> None:
        super().__init__()
        self.piece = piece
        self.failure: str | None = None
        self._call = compile(piece)

    def forward(self, *inputs: Any) -> Any:
        """What the piece computes."""
        if self.failure is None:
            try:
                return self._call(*inputs)
            except RuntimeError as error:  # what Dynamo and Inductor raise
                self.failure = str(error).strip().partition("\n")[0]
        return self.piece(*inputs)


def compile_chains(module: fx.GraphModule, compile: Compile | None = None) -> list[Chain]:
    """Put chains in the place of their calls; ``compile`` is by default Inductor."""
    made, partitions = _partitioned(module, ())
    made.fuse_partitions(partitions)
    chains = []
    for node in module.graph.nodes:
        if node.op == "call_module" and str(node.target).startswith("fused_"):
            piece = module.get_submodule(str(node.target))
            assert isinstance(piece, fx.GraphModule)
            _open_operators(piece)
            chain = Chain(piece, compile or _inductor)
            module.add_submodule(str(node.target), chain)
            chains.append(chain)
    module.recompile()
    return chains


def _open_operators(piece: fx.GraphModule) -> None:
    """Write ``mopt::quantize`` and ``mopt::dequantize`` out in PyTorch's operators."""
    graph = piece.graph
    for node in [node for node in graph.nodes if node.target in _OPENED]:
        value, (x, scale, zero, _) = value_of(node), node.args
        assert value is not None
        with graph.inserting_before(node):
            if node.target == _OPENED[0]:
                limits = torch.iinfo(value.dtype)
                made = graph.call_function(_aten.div.Tensor, (x, scale))
                made = graph.call_function(_aten.round.default, (made,))
                made = graph.call_function(_aten.add.Tensor, (made, zero))
                made = graph.call_function(_aten.clamp.default, (made, limits.min, limits.max))
                made = graph.call_function(_aten._to_copy.default, (made,), {"dtype": value.dtype})
            else:
                made = graph.call_function(_aten._to_copy.default, (x,), {"dtype": value.dtype})
                made = graph.call_function(_aten.sub.Tensor, (made, zero))
                made = graph.call_function(_aten.mul.Tensor, (made, scale))
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    piece.recompile()


def _inductor(piece: nn.Module) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(piece, fullgraph=True)
    return compiled
