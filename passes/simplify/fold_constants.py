"""Compute what is constant."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.effects import is_pure, written_nodes
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, option, register_pass
from mopt.program import Program, module_path, site_of

_ASSERTION = torch.ops.aten._assert_tensor_metadata.default


@register_pass("fold-constants", numerics=Numerics.EXACT)
@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Compute at build time what does not depend on the inputs.

    ## When to use
    First, before any pass that looks at weights: positional tables, masks, reparametrized and
    transposed weights become plain tensors.

    ## Accuracy
    Exact: the same operators run on the same values, only earlier. The result keeps its dtype and
    its memory layout.

    ## Limits
    A result larger than `max_bytes` is stored only if it takes the place of weights at least as
    large. Random operators, memory that is written to, control flow and operators that unpack a
    compressed weight are left alone, and so are results that depend on the size of an input.

    ## Example
    `add(w1, w2)` with two weights becomes one weight.
    """

    max_bytes: int = option(1 << 20, min=0, help="largest result to store, in bytes")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Replace the last constant node of every chain by a stored tensor."""
        constant = _constant_nodes(program)
        folded, added, skipped = 0, 0, []
        for node in reversed(program.nodes):
            if node not in constant or all(user in constant for user in _users(node)):
                continue
            constant.discard(node)
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or _overlaps(value) or not self.selects(_path(node)):
                continue
            size, freed = _bytes(value), _freed_bytes(program, node)
            if size > max(self.max_bytes, freed):
                reason = (
                    f"the result has {size} bytes, more than max_bytes {self.max_bytes} "
                    f"and the {freed} bytes of weights it would replace"
                )
                skipped.append(Skip(site_of(node), reason))
                continue
            _store(program, node)
            folded, added = folded + 1, added + size - freed
        return PassResult(
            changed=bool(folded), stats={"folded": folded, "bytes_added": added}, skipped=skipped
        )


def _constant_nodes(program: Program) -> set[fx.Node]:
    """Calls that read nothing but weights, and may be computed once."""
    written = written_nodes(program)
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        is_call = is_pure(node) and node not in written and _is_plain(node)
        if is_call and all(
            source in constant or (source.op == "get_attr" and source not in written)
            for source in node.all_input_nodes
        ):
            constant.add(node)
    return constant


def _users(node: fx.Node) -> list[fx.Node]:
    """The readers of a node but for assertions about it, which a stored value has passed."""
    return [user for user in node.users if user.target is not _ASSERTION]


def _is_plain(node: fx.Node) -> bool:
    """ATen operators only: those of other namespaces may unpack a compressed weight."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return node.target.namespace in ("aten", "prims")


def _overlaps(value: Tensor) -> bool:
    """Whether elements share memory, as after expand: storing them apart would only take room."""
    return any(
        stride == 0 and size != 1 for size, stride in zip(value.shape, value.stride(), strict=True)
    )


def _path(node: fx.Node) -> str:
    return module_path(node) or node.name


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _freed_bytes(program: Program, node: fx.Node) -> int:
    """Bytes of the weights that nothing reads any more once ``node`` is a weight itself."""
    dead = _only_for(node)
    weights = {n for n in dead if n.op == "get_attr"}
    kept = {
        program.weight(n).untyped_storage()._cdata
        for n in program.graph.nodes
        if n.op == "get_attr" and _users(n) and n not in weights
        and isinstance(n.meta.get("val"), Tensor)
    }  # fmt: skip
    freed: dict[Any, int] = {}
    for weight in weights:
        storage = program.weight(weight).untyped_storage()
        if storage._cdata not in kept:
            freed[storage._cdata] = min(storage.nbytes(), _bytes(program.weight(weight)))
    return sum(freed.values())


def _only_for(node: fx.Node) -> list[fx.Node]:
    """The nodes that ``node`` is computed from and that nothing else needs, users first."""
    found: dict[fx.Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source not in found and all(user is node or user in found for user in _users(source)):
            found[source] = None
            waiting.extend(source.all_input_nodes)
    return list(found)


def _store(program: Program, node: fx.Node) -> None:
    value = _evaluate(program, node)
    path = module_path(node)
    weight = program.add_weight(f"{path}.{node.name}" if path else node.name, value, before=node)
    dead = _only_for(node)
    for user in _users(node):
        user.replace_input_with(node, weight)
    for erased in [node, *dead]:
        for assertion in list(erased.users):
            program.graph.erase_node(assertion)
        program.graph.erase_node(erased)


def _evaluate(program: Program, last: fx.Node) -> Tensor:
    """The value of a constant node, in memory of its own and in its own layout."""
    values: dict[fx.Node, Any] = {}
    order: list[fx.Node] = []
    waiting = [last]
    needed = set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    order = [node for node in program.graph.nodes if node in needed]
    with torch.no_grad():
        for node in order:
            if node.op == "get_attr":
                values[node] = program.weight(node)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    result = values[last]
    assert isinstance(result, Tensor)
    return result.clone(memory_format=torch.preserve_format)
