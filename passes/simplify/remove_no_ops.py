"""Remove what changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from mopt.effects import (
    is_pure,
    memory_behind,
    returned_nodes,
    written_nodes,
)
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, register_pass
from mopt.passes.simplify._identities import Identity, find_identity
from mopt.program import Program, module_path, site_of


@register_pass("remove-no-ops", numerics=Numerics.EXACT)
@dataclass(frozen=True, kw_only=True)
class RemoveNoOps(Pass):
    """Remove operators that change nothing, unused results and spent assertions.

    ## When to use
    After constants are folded and before any pass that looks for neighbouring layers: dropout,
    casts and copies no longer stand between them.

    ## Accuracy
    Exact, down to the sign of zero. Adding 0 to floating-point numbers is kept, because it turns
    -0.0 into 0.0; so is whatever would change a dtype, a shape or a memory layout.

    ## Limits
    A copy is kept where the graph writes to the memory on either side of it, and where removing it
    would make two outputs, or an output and an input or weight, share memory. Assertions on sizes
    that depend on the data stay; those that only repeat a known dtype go.

    ## Example
    `transpose(transpose(x, 1, 2), 1, 2)` becomes `x`, and a dropout in eval mode its input.
    """

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Sweep over the graph until nothing is left to remove."""
        removed: dict[str, int] = {}
        skipped: dict[str, Skip] = {}
        while True:
            found = self._remove_identities(program, skipped) + _remove_unused(program)
            for name in found:
                removed[name] = removed.get(name, 0) + 1
            if not found:
                break
        return PassResult(
            changed=bool(removed),
            stats={"removed": sum(removed.values()), "by_operator": dict(sorted(removed.items()))},
            skipped=list(skipped.values()),
        )

    def _remove_identities(self, program: Program, skipped: dict[str, Skip]) -> list[str]:
        written, returned = written_nodes(program), returned_nodes(program)
        removed = []
        for node in program.nodes:
            if not node.users or not self.selects(module_path(node) or node.name):
                continue
            identity = find_identity(program, node)
            if identity is None:
                continue
            reason = identity.obstacle or _memory_obstacle(identity, node, written, returned)
            if reason:
                skipped[node.name] = Skip(site_of(node), reason)
                continue
            if node in returned:
                returned |= memory_behind([identity.source])
            node.replace_all_uses_with(identity.source)
            program.graph.erase_node(node)
            skipped.pop(node.name, None)
            removed.append(_name(node))
        return removed


def _memory_obstacle(
    identity: Identity, node: fx.Node, written: set[fx.Node], returned: set[fx.Node]
) -> str | None:
    """Why a node that copies its input must stay, or None."""
    if identity.same_memory:
        return None
    if node in written or any(source in written for source in node.all_input_nodes):
        return f"the copy by {_name(node)} protects memory that is written to"
    if node not in returned:
        return None
    if identity.source in returned:
        return f"without the copy by {_name(node)} two outputs would share memory"
    if any(source.op in ("placeholder", "get_attr") for source in memory_behind([identity.source])):
        return f"without the copy by {_name(node)} an output would be an input or a weight itself"
    return None


def _remove_unused(program: Program) -> list[str]:
    """Erase spent assertions, and pure calls and weights that nothing reads."""
    removed = []
    for node in reversed(program.nodes):
        if node.users:
            continue
        if is_pure(node) or _is_spent_assertion(node):
            removed.append(_name(node))
        elif node.op != "get_attr":
            continue
        program.graph.erase_node(node)
    return removed


def _is_spent_assertion(node: fx.Node) -> bool:
    """Whether a node asserts what the graph itself already makes certain."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name
    if name == "aten::_assert_tensor_metadata":
        return True
    if name == "aten::_assert_scalar" or name.startswith("aten::sym_constrain_range"):
        checked = node.args[0]
        value = checked.meta.get("val") if isinstance(checked, fx.Node) else checked
        return not free_unbacked_symbols(value)
    return False


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::")
    return getattr(node.target, "__name__", str(node.target))
