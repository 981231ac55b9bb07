"""Multiplications in front of int8 layers, as options beside the formats.

Behind GELU and its like nothing before a layer takes the factors that would even out its input. A
multiplication of its own does, and costs time: so it is an option of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from mopt.cost import CostModel, Work
from mopt.flops import shape_of
from mopt.formats.base import drop_reader
from mopt.layers import LINEAR, find_layers
from mopt.pass_base import PassContext, Progress
from mopt.passes.choose._options import Sites
from mopt.program import Program
from mopt.registry import make_pass

# Formats that round what a layer reads: only they gain by an input whose channels are even.
_ROUNDED = ("int8-dynamic", "int8-qdq")
_SCALED = " scaled"
_MUL = torch.ops.aten.mul.Tensor


@dataclass(frozen=True)
class Scaled:
    """A program with multiplications in front of layers: their nodes, and the groups behind them.

    The groups have the int8 options of the program without, whose losses are still to be measured.
    """

    program: Program
    products: frozenset[fx.Node]
    sites: list[Sites]


def with_products(
    program: Program, ctx: PassContext, plain: Sequence[Sites],
    read: Callable[[Program], Sequence[Sites]],
) -> Scaled | None:  # fmt: skip
    """A copy with a multiplication wherever that halves the error of int8 layers; None if nowhere.

    The function stays the same; ``program`` is not touched. ``read`` finds a program's groups,
    ``plain`` are those of ``program``.
    """
    if ctx.calibration is None:
        return None
    changed = program.copy()
    # Found by name: families do not import each other, and this one is a whole algorithm.
    make_pass("smooth-activations", {"insert": True}).run(
        changed, replace(ctx, observations=(), progress=Progress())
    )
    changed.refresh()
    there = {node.name for node in find_products(program)}
    new = frozenset(node for node in find_products(changed) if node.name not in there)
    known = {one.name: one for one in plain}
    found = []
    for one in read(changed):
        before = known.get(one.name)
        if before is None or one.layers[0].calls[0].args[0] not in new:
            continue
        rounded = [
            replace(option, loss=0.0, loss_source="exact")
            for option in before.options[1:]
            if all(name.startswith(_ROUNDED) for name in option.formats.values())
        ]
        if rounded:
            one.options = [before.options[0], *rounded]
            found.append(one)
    return Scaled(changed, new, found) if found else None


def find_products(program: Program) -> Iterator[fx.Node]:
    """The multiplications by stored factors that only linear layers read."""
    for node in program.nodes:
        if node.op != "call_function" or node.target is not _MUL or len(node.args) != 2:
            continue
        value, factors = node.args
        if not isinstance(value, fx.Node) or not isinstance(factors, fx.Node):
            continue
        if factors.op != "get_attr" or not str(factors.target).startswith(f"{value.name}_factors"):
            continue
        if all(user.target in LINEAR and user.args[0] is node for user in node.users):
            yield node


def add_scaled(
    plain: Sequence[Sites], scaled: Scaled, model: CostModel | None, *, allow_slower: bool
) -> None:
    """Give the plain groups the options of the scaled ones, with the bytes and time they take."""
    known = {one.name: one for one in plain}
    for one in scaled.sites:
        before = known[one.name]
        product = one.layers[0].calls[0].args[0]
        *outer, width = shape_of(product.meta["val"])
        count = prod(outer) * width
        work = Work(
            "pointwise", count, 4.0 * width, 8.0 * count, shape=(prod(outer), width),
            operator="Mul", variant="pointwise.row",
        )  # fmt: skip
        taken = model.cost(work).milliseconds if model is not None else 0.0
        for option in one.options[1:]:
            more = replace(
                option, name=option.name + _SCALED, latency_ms=option.latency_ms + taken,
                size_bytes=option.size_bytes + 4 * width, border_ms=0.0,
            )  # fmt: skip
            if allow_slower or more.latency_ms <= before.options[0].latency_ms:
                before.options.append(more)


def scaled_layers(sites: Sequence[Sites], choice: Sequence[int]) -> list[str]:
    """The paths of the layers whose chosen option stands behind a multiplication."""
    return [
        layer.path
        for one, index in zip(sites, choice, strict=False)
        for layer in one.layers
        if one.options[index].name.endswith(_SCALED)
    ]


def adopt(program: Program, scaled: Scaled, kept: Set[str]) -> None:
    """Let ``program`` have the multiplications in front of the layers whose paths are ``kept``.

    The factors of all others go back into the weights.
    """
    program.graph_module = scaled.program.graph_module
    paths = {call: layer.path for layer in find_layers(program) for call in layer.calls}
    for node in program.nodes:
        if node not in scaled.products or any(paths.get(user) in kept for user in node.users):
            continue
        value, factors = node.args
        assert isinstance(value, fx.Node) and isinstance(factors, fx.Node)
        scale = program.weight(factors).double()
        for call in list(node.users):
            old = call.args[1]
            assert isinstance(old, fx.Node)
            weight = program.weight(old)
            folded = (weight.double() * scale).to(weight.dtype)
            call.update_arg(0, value)
            call.update_arg(1, program.add_weight(str(old.target), folded, call))
            drop_reader(program, old)
        program.graph.erase_node(node)
        drop_reader(program, factors)
    program.refresh()
