"""Mixtures of experts in a graph: routers, what depends on the number of experts, and removal.

found, skips = find_mixtures(program)
remove_experts(program, found[0], kept=[0, 1, 4])

A router is a linear layer of one score per expert, of which the best few are taken. From there the
axis with a place per expert, and the numbers of experts, are followed through the graph; an
operator that is not known to carry them leaves the mixture whole.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mopt.axis_shapes import set_argument
from mopt.effects import argument
from mopt.layers import LINEAR
from mopt.pass_base import Skip
from mopt.program import Program, module_path

_SAME = {
    "softmax", "log_softmax", "sigmoid", "to", "_to_copy", "clone", "contiguous", "alias",
    "detach", "dropout", "cumsum",
}  # fmt: skip
_SHAPE = {"view": "size", "reshape": "shape", "_unsafe_view": "size"}
_FILLED = {"new_zeros": "size", "zeros": "size", "full": "size", "new_full": "size"}
_GROUPED = "transformers::grouped_mm_fallback"


@dataclass(eq=False)
class Mixture:
    """One layer of experts: ``router`` scores ``experts`` of them, each row goes to ``chosen``.

    ``sizes`` are calls with the number of experts among the sizes they are given, ``stacked`` the
    weights with an axis of experts in front, ``taken`` what reads one expert's share.
    """

    path: str
    router: fx.Node
    experts: int
    chosen: int = 0
    stacked: list[fx.Node] = field(default_factory=list)
    sizes: list[tuple[fx.Node, str]] = field(default_factory=list)
    counts: list[fx.Node] = field(default_factory=list)
    taken: list[fx.Node] = field(default_factory=list)


class _Unknown(Exception):
    """An operator through which experts cannot be followed."""


def find_mixtures(program: Program) -> tuple[list[Mixture], list[Skip]]:
    """All mixtures whose experts can be removed one by one, and why others cannot."""
    found, skips = [], []
    for node in program.graph.nodes:
        if node.target not in LINEAR or not _is_router(node):
            continue
        weight = program.constant(node.args[1])
        if weight is None:
            continue
        path = module_path(node) or node.name
        mixture = Mixture(path, node, len(weight))
        try:
            _follow(program, mixture)
        except _Unknown as unknown:
            skips.append(Skip(path, f"its experts stay: {unknown}"))
        else:
            found.append(mixture)
    return found, skips


def _is_router(node: fx.Node) -> bool:
    """Whether the best few of a linear layer's results are taken, and their numbers used."""
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            name = _name(user)
            if name == "topk":
                axis = argument(user, "dim")
                return axis in (-1, len(node.meta["val"].shape) - 1)
            if name in _SAME or name in _SHAPE:
                waiting.append(user)
    return False


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    return ""


def _follow(program: Program, mixture: Mixture) -> None:
    """Fill in what depends on the number of experts. Raises _Unknown."""
    axes: list[fx.Node] = [mixture.router]  # a place per expert along the last axis
    numbers: list[fx.Node] = []  # which experts
    seen: set[fx.Node] = set()
    while axes or numbers:
        is_axis = bool(axes)
        node = axes.pop() if axes else numbers.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in list(node.users):
            if "_assert" in str(user.target) or "sym_size" in str(user.target):
                continue
            step = _of_axis if is_axis else _of_numbers
            more_axes, more_numbers = step(program, mixture, node, user)
            axes += more_axes
            numbers += more_numbers
    if not mixture.chosen or not (mixture.stacked or mixture.taken):
        raise _Unknown("no expert was found behind it")


_Found = tuple[list[fx.Node], list[fx.Node]]


def _of_axis(program: Program, mixture: Mixture, node: fx.Node, user: fx.Node) -> _Found:
    name = _name(user)
    if name in _SAME:
        return [user], []
    if name in _SHAPE:
        sizes = argument(user, _SHAPE[name])
        if user.meta["val"].shape[-1] != mixture.experts or sizes[-1] not in (-1, mixture.experts):
            raise _Unknown(f"{user.target} folds their axis ({user.name})")
        mixture.sizes.append((user, _SHAPE[name]))
        return [user], []
    if name == "topk":
        mixture.chosen = int(argument(user, "k"))
        return [], [part for part in user.users if part.target is operator.getitem
                    and part.args[1] == 1]  # fmt: skip
    last = len(node.meta["val"].shape) - 1
    if name == "select" and argument(user, "dim") in (-1, last):
        mixture.taken.append(user)
        return [], []
    if name == "scatter":  # the shares were there already
        return [user], []
    if user.target is not None and str(user.target).startswith(_GROUPED.replace("::", ".")):
        _stack(program, mixture, user)
        return [], []
    raise _Unknown(f"{user.target} reads a value with a place for each ({user.name})")


def _of_numbers(program: Program, mixture: Mixture, node: fx.Node, user: fx.Node) -> _Found:
    name = _name(user)
    if name in _SAME or name in _SHAPE or name in ("flatten", "unsqueeze", "squeeze"):
        return [], [user]
    if name == "sort":
        return [], [part for part in user.users if part.args[1] == 0]
    if name == "histc" and argument(user, "bins") == mixture.experts:
        mixture.counts.append(user)
        return [user], []
    if name == "scatter" and argument(user, "index") is node:
        base = argument(user, "self")
        kind = _name(base) if isinstance(base, fx.Node) else ""
        if kind not in _FILLED or argument(base, _FILLED[kind])[-1] != mixture.experts:
            raise _Unknown(f"{user.target} writes shares into a value that is not new")
        mixture.sizes.append((base, _FILLED[kind]))
        return [user], []
    raise _Unknown(f"{user.target} reads their numbers ({user.name})")


def _stack(program: Program, mixture: Mixture, call: fx.Node) -> None:
    """The weight of a grouped product, read as it is or transposed."""
    view: Any = call.args[1]
    weight = view.args[0] if _name(view) == "transpose" else view
    tensor = program.constant(weight)
    if tensor is None or tensor.dim() != 3 or len(tensor) != mixture.experts:
        raise _Unknown(f"{call.target} reads a weight that is no stack of experts")
    if len(weight.users) != 1:
        raise _Unknown("their weights are read elsewhere too")
    mixture.stacked.append(weight)


def remove_experts(program: Program, mixture: Mixture, kept: Sequence[int]) -> None:
    """Keep only those experts, in that order of numbers; the router chooses among them.

    The result is what the model gives if the router's scores of the others are minus infinity.
    """
    index = torch.tensor(sorted(kept))
    count = len(index)
    for at in (1, 2):
        reader = mixture.router.args[at] if len(mixture.router.args) > at else None
        if isinstance(reader, fx.Node):
            _slice(program, reader, index, mixture.router)
    for reader in mixture.stacked:
        _slice(program, reader, index, next(iter(reader.users)))
    for node, name in mixture.sizes:
        sizes = list(argument(node, name))
        sizes[-1] = count if sizes[-1] == mixture.experts else sizes[-1]
        set_argument(node, name, sizes)
    for node in mixture.counts:
        set_argument(node, "bins", count)
        set_argument(node, "max", count - 1)
    places = {old: new for new, old in enumerate(index.tolist())}
    for node in mixture.taken:
        old = int(argument(node, "index")) % mixture.experts
        if old in places:
            set_argument(node, "index", places[old])
        else:
            _leave_out(program, node)
    program.refresh()


def _slice(program: Program, reader: fx.Node, index: Tensor, before: fx.Node) -> None:
    tensor = program.weight(reader).index_select(0, index)
    stored = program.add_weight(f"{reader.target}_kept", tensor, before)
    reader.replace_all_uses_with(stored)
    program.graph.erase_node(reader)


def _leave_out(program: Program, share: fx.Node) -> None:
    """Take the terms that a share scales out of the sums they are added to."""
    behind, waiting = {share}, [share]
    sums: list[fx.Node] = []
    while waiting:
        for user in waiting.pop().users:
            if _name(user) in ("add", "add_", "index_add", "index_add_"):
                sums.append(user)
            elif user not in behind and "_assert" not in str(user.target):
                behind.add(user)
                waiting.append(user)
    for node in sums:
        total = next(source for source in node.all_input_nodes if source not in behind)
        node.replace_all_uses_with(total)
    dead = behind | set(sums)
    for node in reversed(program.nodes):
        if node in dead and not [u for u in node.users if "_assert" not in str(u.target)]:
            for user in list(node.users):
                program.graph.erase_node(user)
            sources = node.all_input_nodes
            program.graph.erase_node(node)
            dead.update(one for one in sources if one.op in ("call_function", "get_attr"))
