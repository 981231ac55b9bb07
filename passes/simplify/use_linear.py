"""Write products with a constant matrix as linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.effects import argument, written_nodes
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, register_pass
from mopt.program import Program, module_path, site_of

_aten = torch.ops.aten
_PRODUCTS = (_aten.addmm.default, _aten.mm.default, _aten.matmul.default)


@register_pass("use-linear", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class UseLinear(Pass):
    """Write products with a constant matrix as linear layers.

    ## When to use
    Before any pass that looks for layers: models that keep their weights as (in, out) matrices,
    such as GPT-2, have none otherwise.

    ## Accuracy
    Rounding: the same products are summed, perhaps in another order, because the matrix is stored
    transposed, as a linear layer has it.

    ## Limits
    `addmm`, `mm` and `matmul` with a weight of two axes on the right; a bias of `addmm` must be a
    weight of one axis. A matrix with other readers is left alone, since it would be stored twice.

    ## Example
    `addmm(b, x, w)` becomes `linear(x, w.t(), b)`.
    """

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Replace each product, or say why it stays."""
        rewritten, skipped = 0, []
        written = written_nodes(program)
        for node in program.nodes:
            if node.target not in _PRODUCTS or not self.selects(module_path(node) or node.name):
                continue
            matrix = node.args[-1] if node.target is not _aten.addmm.default else node.args[2]
            weight = program.constant(matrix)
            if weight is None or weight.dim() != 2 or matrix in written:
                continue
            problem = _problem(program, node, matrix)
            if problem:
                skipped.append(Skip(site_of(node), problem))
                continue
            _rewrite(program, node, matrix, weight)
            rewritten += 1
        return PassResult(changed=bool(rewritten), stats={"rewritten": rewritten}, skipped=skipped)


def _problem(program: Program, node: fx.Node, matrix: Any) -> str | None:
    """Why a product with a weight is not written as a linear layer, or None."""
    name = str(matrix.target)
    if any(user is not node for user in matrix.users) or _has_twin(program, matrix):
        return f"weight {name!r} has other readers and would be stored twice"
    if node.target is not _aten.addmm.default:
        return None
    if argument(node, "alpha") != 1 or argument(node, "beta") != 1:
        return "its product or its bias is scaled"
    bias = program.constant(node.args[0])
    if bias is None or bias.dim() != 1 or bias.shape[0] != program.weight(matrix).shape[1]:
        return "its bias is not a weight with one element per column"
    return None


def _has_twin(program: Program, weight: fx.Node) -> bool:
    """Whether the memory of a weight is read under another name too."""
    storage = program.weight(weight).untyped_storage()._cdata
    return any(
        node is not weight and node.users
        and program.weight(node).untyped_storage()._cdata == storage
        for node in program.graph.nodes
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)
    )  # fmt: skip


def _rewrite(program: Program, node: fx.Node, matrix: Any, weight: Tensor) -> None:
    is_addmm = node.target is _aten.addmm.default
    x, bias = (node.args[1], node.args[0]) if is_addmm else (node.args[0], None)
    stored = program.add_weight(f"{matrix.target}_linear", weight.t().contiguous(), before=node)
    arguments = (x, stored) if bias is None else (x, stored, bias)
    program.replace_call(node, _aten.linear.default, arguments)
    program.graph.erase_node(matrix)
