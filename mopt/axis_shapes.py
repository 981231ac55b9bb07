"""How operators that move elements around carry atoms from axis to axis."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mopt.axes import Factor, Keep, Labels, Tracker, find, moved, rows_kept
from mopt.effects import argument
from mopt.flops import size_hint

Result = Labels | list[Labels]
Rule = Callable[[Tracker, fx.Node, str], Result]
SHAPE_RULES: dict[str, Rule] = {}

_STRIDES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)


def shape_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of operators by name."""

    def register(function: Rule) -> Rule:
        SHAPE_RULES.update(dict.fromkeys(names, function))
        return function

    return register


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give an operator call another value for the argument of that name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [parameter.name for parameter in node.target._schema.arguments]
    at = names.index(name)
    if name in node.kwargs or at >= len(node.args):
        node.kwargs = {**node.kwargs, name: value}
    else:
        node.args = (*node.args[:at], value, *node.args[at + 1 :])


def axis_of(node: fx.Node, rank: int, name: str = "dim") -> int:
    """The axis an operator works along, counted from the front."""
    given = argument(node, name)
    return int(given if given is not None else 0) % max(rank, 1)


@shape_rule(
    "permute", "transpose", "t", "mT", "swapaxes", "swapdims", "movedim", "unsqueeze", "squeeze",
    "numpy_T",
)  # fmt: skip
def _renamed(t: Tracker, node: fx.Node, why: str) -> Result:
    """Strides of a probe tell where each axis goes."""
    labels, shape = t.of(node.args[0]), t.shape(node.args[0])
    if "squeeze" in node.name and "unsqueeze" not in node.name:
        # An axis that shrank to 1 would vanish.
        chosen = argument(node, "dim")
        listed = range(len(shape)) if chosen is None else np.atleast_1d(chosen).tolist()
        for axis in listed:
            labels = t.fix(labels, axis % len(shape), why)
    sizes = [size_hint(size) for size in shape]
    probe = torch.empty_strided(sizes, _STRIDES[: len(sizes)], device="meta")
    result = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    place = {stride: axis for axis, stride in enumerate(result.stride())}
    return moved(labels, lambda axis: place.get(_STRIDES[axis]))


@shape_rule("expand", "expand_as", "broadcast_to")
def _expand(t: Tracker, node: fx.Node, why: str) -> Result:
    """A repeated axis may have any length, so it gets atoms of its own."""
    source, target = t.shape(node.args[0]), t.shape(node)
    by = len(target) - len(source)
    result = list(moved(t.of(node.args[0]), lambda axis: axis + by))
    for axis, size in enumerate(target):
        old = source[axis - by] if axis >= by else 1
        if isinstance(old, int) and old == 1 and isinstance(size, int) and size > 1:
            result.append(Factor((axis,), t.fresh(size, spare=True)))
    if node.target is torch.ops.aten.expand_as.default:
        return t.broadcast(
            [(tuple(result), target), (t.of(node.args[1]), target)], len(target), why
        )
    _rewrite_sizes(t, node, tuple(result), "size", 0)
    return tuple(result)


@shape_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(t: Tracker, node: fx.Node, why: str) -> Result:
    source, target = t.shape(node.args[0]), t.shape(node)
    labels = t.of(node.args[0])
    if node.target._schema.name.endswith("_as"):  # type: ignore[union-attr]
        return _frozen(t, labels, why)
    result = regroup(t, labels, source, target, why)
    first = axis_of(node, len(source)) if "unflatten" in str(node.target) else 0
    name = "sizes" if "unflatten" in str(node.target) else "size"
    name = "shape" if "reshape" in str(node.target) else name
    if "flatten" not in str(node.target) or "unflatten" in str(node.target):
        _rewrite_sizes(t, node, result, name, first)
    return result


def _rewrite_sizes(t: Tracker, node: fx.Node, labels: Labels, name: str, first: int) -> None:
    """Write the new lengths into a list of sizes whose first entry is for axis ``first``."""
    if not labels:
        return

    def rewrite(keep: Keep) -> None:
        sizes = list(argument(node, name))
        for at, size in enumerate(sizes):
            factor = find(labels, first + at)
            if factor is not None and isinstance(size, int) and size != -1:
                sizes[at] = int(rows_kept(keep, factor, first + at).sum())
        set_argument(node, name, sizes)

    t.rewrites.append(rewrite)


def _frozen(t: Tracker, labels: Labels, why: str) -> Labels:
    t.freeze_all(labels, why)
    return ()


def regroup(
    t: Tracker, labels: Labels, source: Sequence[Any], target: Sequence[Any], why: str
) -> Labels:
    """The labels after a reshape: runs of axes with equal products are cut or joined."""
    runs = _runs(source, target)
    run_of = {axis: run for run in runs if run is not None for axis in run[0]}
    result: list[Factor] = []
    taken: dict[int, Factor] = {}  # by new axis
    # Spare atoms come last: they give way where two factors end up in one run.
    order = sorted(labels, key=lambda f: (t.is_spare(f.atoms), min(f.axes)))
    for factor in order:
        found = _carried(factor, run_of, source, target)
        if found is None or any(axis in taken for axis in found.axes):
            t.freeze(factor.atoms, why)
            continue
        found = _without_constant_axes(found)
        taken.update(dict.fromkeys(found.axes, found))
        result.append(found)
    return tuple(result)


def _carried(
    factor: Factor, run_of: dict[int, Any], source: Sequence[Any], target: Sequence[Any]
) -> Factor | None:
    touched: list[tuple[list[int], list[int]]] = []
    for axis in factor.axes:
        run = run_of.get(axis)
        if run is None:
            return None
        if run not in touched:
            touched.append(run)
    touched.sort()
    olds = [axis for old, _ in touched for axis in old]
    news = [axis for _, new in touched for axis in new]
    sizes = [source[axis] for axis in olds], [target[axis] for axis in news]
    if not all(isinstance(size, int) for part in sizes for size in part):
        return None
    index = [factor.axes.index(axis) for axis in olds if axis in factor.axes]
    atoms = factor.atoms.transpose(index)
    shape = [source[axis] if axis in factor.axes else 1 for axis in olds]
    atoms = np.broadcast_to(atoms.reshape(shape), sizes[0]).reshape(sizes[1])
    return Factor(tuple(news), atoms)


def _without_constant_axes(factor: Factor) -> Factor:
    """Axes along which the atoms do not differ cannot shrink."""
    atoms, axes = factor.atoms, list(factor.axes)
    for axis in factor.axes:
        at = axes.index(axis)
        first = atoms.take([0], axis=at)
        if len(axes) > 1 and bool((atoms == first).all()):
            atoms = first.squeeze(at)
            axes.pop(at)
    return Factor(tuple(axes), atoms)


def _runs(source: Sequence[Any], target: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of old and new axes that hold the same elements, without axes of size 1."""
    old = [axis for axis, size in enumerate(source) if not _is_one(size)]
    new = [axis for axis, size in enumerate(target) if not _is_one(size)]
    runs = []
    i = j = 0
    while i < len(old) and j < len(new):
        left, right = [old[i]], [new[j]]
        i, j = i + 1, j + 1
        while True:
            a = prod(source[axis] for axis in left)
            b = prod(target[axis] for axis in right)
            if statically_known_true(a == b):
                runs.append((left, right))
                break
            if i == len(old) and j == len(new):
                return runs
            if (size_hint(a) <= size_hint(b) and i < len(old)) or j == len(new):
                left.append(old[i])
                i += 1
            else:
                right.append(new[j])
                j += 1
    return runs


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


@shape_rule("slice", "narrow")
def _slice(t: Tracker, node: fx.Node, why: str) -> Result:
    labels, shape = t.of(node.args[0]), t.shape(node.args[0])
    axis = axis_of(node, len(shape))
    factor = find(labels, axis)
    if factor is None:
        return labels
    size = shape[axis]
    if node.target._schema.name == "aten::narrow":  # type: ignore[union-attr]
        start, step = argument(node, "start"), 1
        count = argument(node, "length")
        stop = start + count if isinstance(start, int) and isinstance(count, int) else None
    else:
        start, stop, step = (argument(node, name) for name in ("start", "end", "step"))
        start, stop = start or 0, size if stop is None else stop
    if not all(isinstance(value, int) for value in (start, stop, step)) or step != 1:
        return t.fix(labels, axis, why)
    start, stop, _ = slice(start, stop).indices(size)
    if (start, stop) == (0, size):
        return labels
    at = factor.axes.index(axis)
    cut = Factor(factor.axes, factor.atoms.take(range(start, stop), axis=at))

    def rewrite(keep: Keep) -> None:
        rows = rows_kept(keep, factor, axis)
        begin, end = int(rows[:start].sum()), int(rows[:stop].sum())
        if node.target._schema.name == "aten::narrow":  # type: ignore[union-attr]
            set_argument(node, "start", begin)
            set_argument(node, "length", end - begin)
        else:
            set_argument(node, "start", begin)
            set_argument(node, "end", end)

    t.rewrites.append(rewrite)
    return (*(other for other in labels if other is not factor), cut)


@shape_rule("split", "split_with_sizes", "chunk")
def _split(t: Tracker, node: fx.Node, why: str) -> Result:
    labels, shape = t.of(node.args[0]), t.shape(node.args[0])
    axis = axis_of(node, len(shape))
    factor = find(labels, axis)
    pieces = [value.shape[axis] for value in node.meta["val"]]
    if factor is None or not all(isinstance(piece, int) for piece in pieces):
        labels = t.fix(labels, axis, why)
        return [labels] * len(pieces)
    at, rest = factor.axes.index(axis), tuple(other for other in labels if other is not factor)
    ends = np.cumsum(pieces)
    parts = np.split(factor.atoms, ends[:-1], axis=at)

    def rewrite(keep: Keep) -> None:
        rows = rows_kept(keep, factor, axis)
        sizes = [int(piece.sum()) for piece in np.split(rows, ends[:-1])]
        if sum(sizes) < len(rows):
            node.target = torch.ops.aten.split_with_sizes.default
            node.args, node.kwargs = (node.args[0], sizes, axis), {}

    t.rewrites.append(rewrite)
    return [(*rest, Factor(factor.axes, part)) for part in parts]


@shape_rule("unbind", "select")
def _select(t: Tracker, node: fx.Node, why: str) -> Result:
    """Slices taken out one by one stay, and what they have in common shrinks in all of them."""
    shape = t.shape(node.args[0])
    axis = axis_of(node, len(shape))
    labels = t.fix(t.of(node.args[0]), axis, why)
    result = moved(labels, lambda old: old - (old > axis))
    if node.target._schema.name == "aten::unbind":  # type: ignore[union-attr]
        return [result] * len(node.meta["val"])
    return result


@shape_rule("cat", "concat", "concatenate")
def _cat(t: Tracker, node: fx.Node, why: str) -> Result:
    sources = [one for one in node.args[0] if t.shape(one) != (0,)]  # type: ignore[union-attr]
    rank = len(t.shape(node))
    axis = axis_of(node, rank)
    found = [t.of(one) for one in sources]
    cuts = [find(labels, axis) for labels in found]
    if any(cuts) and len({cut.axes if cut else None for cut in cuts}) > 1:
        found = [t.commit(labels, axis, why) for labels in found]
        cuts = [find(labels, axis) for labels in found]
    lengths = [t.shape(one)[axis] for one in sources]
    joined: tuple[Factor, ...] = ()
    if any(cuts) and all(isinstance(length, int) for length in lengths):
        pieces = []
        for cut, length in zip(cuts, lengths, strict=True):
            if cut is None:  # this part stays whole, the others may shrink
                stays = t.fresh(length)
                t.freeze(stays, why)
                cut = Factor((axis,), stays)
            pieces.append(cut)
        at = pieces[0].axes.index(axis)
        joined = (Factor(pieces[0].axes, np.concatenate([p.atoms for p in pieces], axis=at)),)
    else:
        found = [t.fix(labels, axis, why) for labels in found]
    others = [
        (tuple(f for f in labels if axis not in f.axes),
         tuple(1 if i == axis else s for i, s in enumerate(t.shape(one))))
        for labels, one in zip(found, sources, strict=True)
    ]  # fmt: skip
    taken = {own for factor in joined for own in factor.axes}
    rest = t.broadcast([(labels, _hide(shape, taken)) for labels, shape in others], rank, why)
    return (*joined, *rest)


def _hide(shape: tuple[Any, ...], axes: set[int]) -> tuple[Any, ...]:
    return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


@shape_rule("stack")
def _stack(t: Tracker, node: fx.Node, why: str) -> Result:
    sources = list(node.args[0])  # type: ignore[arg-type]
    rank = len(t.shape(node))
    axis = axis_of(node, rank)
    result = t.broadcast([(t.of(one), t.shape(one)) for one in sources], rank - 1, why)
    return moved(result, lambda old: old + (old >= axis))


@shape_rule("repeat_interleave")
def _repeat_each(t: Tracker, node: fx.Node, why: str) -> Result:
    labels, times = t.of(node.args[0]), argument(node, "repeats")
    axis = argument(node, "dim")
    if not isinstance(axis, int):
        return _frozen(t, labels, why)
    axis %= len(t.shape(node.args[0]))
    if not isinstance(times, int):
        labels = t.fix(labels, axis, why)
    factor = find(labels, axis)
    if factor is None:
        return labels
    at = factor.axes.index(axis)
    repeated = Factor(factor.axes, factor.atoms.repeat(times, axis=at))
    return (*(other for other in labels if other is not factor), repeated)


@shape_rule("repeat", "tile")
def _repeat(t: Tracker, node: fx.Node, why: str) -> Result:
    """Axes that are repeated stay; the others pass."""
    labels, shape = t.of(node.args[0]), t.shape(node.args[0])
    times = list(argument(node, "repeats") or argument(node, "dims"))
    by = len(times) - len(shape)
    for axis in range(len(shape)):
        if not isinstance(times[axis + by], int) or times[axis + by] != 1:
            labels = t.fix(labels, axis, why)
    return moved(labels, lambda axis: axis + by)


def item(t: Tracker, node: fx.Node) -> Result:
    """One result of a call with several."""
    assert node.target is operator.getitem
    source, at = node.args
    found = t.labels.get(source, ())  # type: ignore[call-overload]
    return found[at] if isinstance(found, list) else ()
