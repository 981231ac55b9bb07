"""Compute everything once."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.effects import is_pure, may_alias, returned_nodes, written_nodes
from mopt.hashes import tensor_hash
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, register_pass
from mopt.program import Program, module_path, site_of


@register_pass("merge-duplicates", numerics=Numerics.EXACT)
@dataclass(frozen=True, kw_only=True)
class MergeDuplicates(Pass):
    """Compute a value once that is computed twice, and store a weight once that is stored twice.

    ## When to use
    After constants are folded, so that equal tables and masks of all layers have become weights.

    ## Accuracy
    Exact: the same operator on the same arguments gives the same value. Weights are the same when
    dtype, shape, memory layout and every byte are.

    ## Limits
    Random operators and memory that is written to are left alone. Two outputs that were separate
    tensors stay separate.

    ## Example
    `add(sin(x), sin(x))` computes `sin(x)` once; two layers initialised alike share one weight.
    """

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Give every node the first node that has the same value."""
        written, returned = written_nodes(program), returned_nodes(program)
        first: dict[Hashable, fx.Node] = {}
        merged = {"weights": 0, "calls": 0, "bytes_saved": 0}
        skipped = []
        for node in program.nodes:
            key = self._key(program, node, written)
            if key is None:
                continue
            same = first.setdefault(key, node)
            if same is node:
                continue
            if _separate_outputs(node, same, returned):
                skipped.append(Skip(site_of(node), "two outputs would share memory"))
                continue
            if node.op == "get_attr":
                merged["weights"] += 1
                merged["bytes_saved"] += _saved(program, node, same)
            else:
                merged["calls"] += 1
            node.replace_all_uses_with(same)
            program.graph.erase_node(node)
        changed = bool(merged["weights"] or merged["calls"])
        return PassResult(changed=changed, stats=merged, skipped=skipped)

    def _key(self, program: Program, node: fx.Node, written: set[fx.Node]) -> Hashable | None:
        """What the value of a node is determined by, or None if nodes like it must not merge."""
        if node in written or any(source in written for source in node.all_input_nodes):
            return None
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor):
            weight = program.weight(node)
            # A parameter cannot stand in for a buffer: operators refuse gradients for statistics.
            grad = program.requires_grad(node)
            return ("weight", tensor_hash(weight), weight.stride(), str(weight.device), grad)
        if not is_pure(node) or not self.selects(module_path(node) or node.name):
            return None
        return (node.target, _freeze(node.args), _freeze(dict(node.kwargs)))


def _separate_outputs(node: fx.Node, same: fx.Node, returned: set[fx.Node]) -> bool:
    """Whether both values reach the caller and are not views of one memory anyway."""
    if node not in returned or same not in returned:
        return False
    return node.op == "get_attr" or not may_alias(node)


def _saved(program: Program, node: fx.Node, same: fx.Node) -> int:
    weight, kept = program.weight(node), program.weight(same)
    if weight.untyped_storage()._cdata == kept.untyped_storage()._cdata:
        return 0
    return weight.numel() * weight.element_size()


def _freeze(value: Any) -> Hashable:
    """A hashable form in which 1, 1.0 and True, and 0.0 and -0.0, are not equal."""
    if isinstance(value, list | tuple):
        return (type(value) is slice, *(_freeze(item) for item in value))
    if isinstance(value, dict):
        return tuple((key, _freeze(value[key])) for key in sorted(value))
    if isinstance(value, float):
        return ("float", str(value) if math.isnan(value) else value.hex())
    if isinstance(value, fx.Node | str | torch.dtype | torch.device | type(None)):
        return value
    return (type(value).__name__, value)
