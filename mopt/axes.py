"""Which elements along the axes of a program's values stand and fall together.

Every position along an axis that could be removed is an *atom*. Operators tie atoms: the channel a
convolution writes is the one that the batch norm behind it scales. An axis without atoms is fixed:
its length must stay. Where one axis was cut in several (width into heads and head width), the atoms
are kept on all of them together until an operator decides which of them may shrink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from mopt.program import Program

Array = NDArray[np.int64]
Mask = NDArray[np.bool_]
# Atoms of an array that are kept, as a mask of the same shape.
Keep = Callable[[Array], Mask]
Rewrite = Callable[[Keep], None]


@dataclass(frozen=True)
class Factor:
    """Atoms on one or more axes of a value: ``atoms`` has one dimension per axis."""

    axes: tuple[int, ...]
    atoms: Array


Labels = tuple[Factor, ...]

_PASSED_ON = ": what it meets there keeps its width"


def rows_kept(keep: Keep, factor: Factor, axis: int) -> Mask:
    """Which positions along ``axis`` stay: those with any atom that stays."""
    mask = keep(factor.atoms)
    others = tuple(i for i, own in enumerate(factor.axes) if own != axis)
    return np.asarray(mask.any(axis=others)) if others else mask


def find(labels: Labels, axis: int) -> Factor | None:
    """The atoms on an axis, None if it is fixed."""
    return next((factor for factor in labels if axis in factor.axes), None)


def moved(labels: Labels, axis_of: Callable[[int], int | None]) -> Labels:
    """The labels with every axis renamed; factors of which an axis has no new name are dropped."""
    found = []
    for factor in labels:
        axes = [axis_of(axis) for axis in factor.axes]
        if all(axis is not None for axis in axes):
            order = sorted(range(len(axes)), key=lambda i: axes[i])  # type: ignore[arg-type,return-value]
            found.append(
                Factor(tuple(axes[i] for i in order), factor.atoms.transpose(order))  # type: ignore[misc]
            )
    return tuple(found)


def _shifted(labels: Labels, by: int) -> Labels:
    return moved(labels, lambda axis: axis + by) if by else labels


class Tracker:
    """Atoms and labels of one program, filled in by the rules of its operators.

    ``labels`` holds what is known of every node: its labels, or a list of them for a call with
    several results. ``weights`` holds the atoms along single axes of stored tensors, by tensor and
    axis; ``rewrites`` what must be changed in arguments once it is known what is kept. With
    ``through_norms`` the widths that norms run over may shrink too.
    """

    def __init__(self, program: Program, *, through_norms: bool = False) -> None:
        self.program = program
        self.through_norms = through_norms
        self.labels: dict[fx.Node, Labels | list[Labels]] = {}
        self.weights: dict[tuple[Any, int], Array] = {}
        self.readers: dict[Any, list[fx.Node]] = {}
        self.rewrites: list[Rewrite] = []
        self.count = 0
        self._pairs: list[tuple[Array, Array]] = []
        self._frozen: list[tuple[Array, str]] = []
        self._spare: list[tuple[int, int]] = []

    # ---- atoms

    def fresh(self, size: int, *, spare: bool = False) -> Array:
        """New atoms. ``spare`` ones belong to no weight and give way where axes compete."""
        atoms = np.arange(self.count, self.count + size, dtype=np.int64)
        if spare:
            self._spare.append((self.count, self.count + size))
        self.count += size
        return atoms

    def is_spare(self, atoms: Array) -> bool:
        """Whether all atoms are spare."""
        first, last = int(atoms.min()), int(atoms.max())
        return any(start <= first and last < stop for start, stop in self._spare)

    def tie(self, left: Array, right: Array) -> None:
        """Element by element, both stay or both go (arrays broadcast)."""
        if left is not right:
            a, b = np.broadcast_arrays(left, right)
            self._pairs.append((a.ravel(), b.ravel()))

    def freeze(self, atoms: Array, why: str) -> None:
        """These atoms stay."""
        self._frozen.append((atoms.ravel(), why))

    def freeze_all(self, labels: Labels, why: str) -> None:
        """All axes keep their lengths."""
        for factor in labels:
            self.freeze(factor.atoms, why)

    def classes(self) -> tuple[Array, dict[int, str]]:
        """Per atom the number of its class, and for classes that must stay the reason."""
        label = np.arange(self.count, dtype=np.int64)
        if self._pairs:
            left = np.concatenate([a for a, _ in self._pairs])
            right = np.concatenate([b for _, b in self._pairs])
            while True:
                a, b = label[left], label[right]
                apart = a != b
                if not apart.any():
                    break
                left, right, a, b = left[apart], right[apart], a[apart], b[apart]
                np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
                while True:
                    further = label[label]
                    if np.array_equal(further, label):
                        break
                    label = further
        reasons: dict[int, str] = {}
        # What an operand without atoms passes on says less than where it comes from.
        for atoms, why in sorted(self._frozen, key=lambda entry: entry[1].endswith(_PASSED_ON)):
            for one in np.unique(label[atoms]).tolist():
                reasons.setdefault(one, why)
        return label, reasons

    # ---- nodes

    def of(self, argument: Any) -> Labels:
        """The labels of an argument; a weight gets atoms on all axes longer than 1."""
        if not isinstance(argument, fx.Node):
            return ()
        if argument.op == "get_attr":
            sizes = self.shape(argument)
            return tuple(
                Factor((axis,), self.weight_axis(argument, axis))
                for axis, size in enumerate(sizes)
                if isinstance(size, int) and size > 1
            )
        found = self.labels.get(argument, ())
        return () if isinstance(found, list) else found

    def shape(self, argument: Any) -> tuple[Any, ...]:
        """The sizes of a tensor argument, symbolic where they depend on the inputs."""
        value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def weight_axis(self, reader: fx.Node, axis: int) -> Array:
        """The atoms along one axis of a stored tensor; all its readers share them."""
        tensor = self.program.weight(reader)
        key = tensor_key(tensor)
        known = self.readers.setdefault(key, [])
        if reader not in known:
            known.append(reader)
        if (key, axis) not in self.weights:
            self.weights[key, axis] = self.fresh(tensor.shape[axis])
        return self.weights[key, axis]

    def take(self, argument: Any, axis: int, why: str) -> Array | None:
        """The atoms along one axis of an argument that may shrink there and nowhere else.

        None if the axis is fixed. All other axes of a computed argument become fixed.
        """
        rank = len(self.shape(argument))
        axis %= rank
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            size = self.shape(argument)[axis]
            return self.weight_axis(argument, axis) if isinstance(size, int) else None
        labels = self.of(argument)
        for other in range(rank):
            if other != axis:
                labels = self.fix(labels, other, why)
        factor = find(labels, axis)
        return factor.atoms if factor else None

    def take_both(self, weight: Any, why: str) -> tuple[Array | None, Array | None]:
        """The atoms along the input and the output axis of a matrix (outputs, inputs)."""
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            return self.weight_axis(weight, 1), self.weight_axis(weight, 0)
        labels = self.first_axes(self.of(weight), why)
        found = [find(labels, axis) for axis in (1, 0)]
        return found[0].atoms if found[0] else None, found[1].atoms if found[1] else None

    # ---- axes

    def fix(self, labels: Labels, axis: int, why: str) -> Labels:
        """The labels with the length of one axis fixed.

        Where atoms lie on several axes together they may still go in whole slices along the others.
        """
        factor = find(labels, axis)
        if factor is None:
            return labels
        rest = tuple(other for other in labels if other is not factor)
        if len(factor.axes) == 1:
            self.freeze(factor.atoms, why)
            return rest
        at = factor.axes.index(axis)
        first = factor.atoms.take([0], axis=at)
        self.tie(factor.atoms, first)
        axes = factor.axes[:at] + factor.axes[at + 1 :]
        return (*rest, Factor(axes, first.squeeze(at)))

    def commit(self, labels: Labels, axis: int, why: str) -> Labels:
        """Of the axes that share atoms with ``axis``, only that one may shrink."""
        factor = find(labels, axis)
        for other in factor.axes if factor else ():
            if other != axis:
                labels = self.fix(labels, other, why)
        return labels

    def first_axes(self, labels: Labels, why: str) -> Labels:
        """Atoms on several axes together may only go along the first of them."""
        for factor in labels:
            labels = self.commit(labels, min(factor.axes), why)
        return labels

    def broadcast(
        self, operands: Sequence[tuple[Labels, tuple[Any, ...]]], rank: int, why: str
    ) -> Labels:
        """The labels of an element-wise result; what meets along an axis is tied."""
        shapes = [(1,) * (rank - len(shape)) + shape for _, shape in operands]
        found = [_shifted(labels, rank - len(shape)) for labels, shape in operands]
        settled = False
        while not settled:
            settled = True
            for axis in range(rank):
                meet = [i for i, shape in enumerate(shapes) if not _is_one(shape[axis])]
                factors = {i: find(found[i], axis) for i in meet}
                present = [factor for factor in factors.values() if factor is not None]
                if not present:
                    continue
                if len(present) < len(meet):
                    for i, factor in factors.items():
                        if factor is not None:
                            found[i] = self.fix(found[i], axis, f"{why}{_PASSED_ON}")
                    settled = False
                elif any(factor.axes != present[0].axes for factor in present):
                    widest = max(meet, key=lambda i: len(factors[i].axes))  # type: ignore[union-attr]
                    keep = min(factors[widest].axes)  # type: ignore[union-attr]
                    found[widest] = self.commit(found[widest], keep, why)
                    settled = False
                if not settled:
                    break
        result: dict[tuple[int, ...], Factor] = {}
        for i, labels in enumerate(found):
            for factor in labels:
                if all(_is_one(shapes[i][axis]) for axis in factor.axes):
                    continue
                known = result.setdefault(factor.axes, factor)
                self.tie(known.atoms, factor.atoms)
        return tuple(result.values())


def tensor_key(tensor: Tensor) -> Any:
    """What is equal for two readers of one stored tensor in one shape."""
    place = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
    return place, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _is_one(size: Any) -> bool:
    return not isinstance(size, torch.SymInt) and size == 1
