"""What can be taken out of a program as a whole: channels, neurons, heads, and all that goes along.

found = find_coupling(program)
found.groups                      # units that are alike, with the weights they own
shrink(program, found, removed)   # slices weights, rewrites the sizes in the graph

Everything that an operator without a rule touches, that the caller gives or gets, or that a
statistic runs over, stays whole; ``Coupling.skips`` says what and why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mopt.axes import Array, Factor, Keep, Mask, Tracker, tensor_key
from mopt.axis_recurrent import LSTM
from mopt.axis_rules import apply_rule
from mopt.flops import node_flops
from mopt.layers import CONVOLUTIONS, LINEAR
from mopt.pass_base import Skip
from mopt.program import Program, module_path, site_of

_RETURNED = "the model returns it"
_EMPTY = "an axis would be empty without it"
_CROOKED = "what it owns does not lie along one axis"


@dataclass(frozen=True, eq=False)
class Member:
    """A stored tensor of a group: ``units`` has the number of the unit at each place of ``axis``,
    -1 where the place stays.

    ``role`` is "out" where a layer writes the units, "in" where it reads them, else "vector".
    """

    call: fx.Node
    weight: fx.Node
    axis: int
    role: str
    units: Array


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are alike: they own the same places in the same tensors, each its own share.

    ``width`` is how many places a unit has where it is written: 1 for channels and neurons, the
    head width for heads; as many times that as one layer writes of the unit (three in a fused q, k,
    v). ``kind`` is channels, neurons, heads, hidden units or stream channels.
    """

    path: str
    kind: str
    units: Array
    width: int
    members: tuple[Member, ...]

    def of_role(self, role: str) -> list[Member]:
        """The members of a role, in graph order."""
        return [member for member in self.members if member.role == role]


@dataclass(eq=False)
class Coupling:
    """Groups of removable units, and what must be known to remove some of them.

    ``unit_of`` has for every atom the number of its unit, -1 for those that stay.
    """

    tracker: Tracker
    unit_of: Array
    unit_count: int
    groups: list[Group]
    skips: list[Skip]
    arrays: list[Array] = field(default_factory=list)

    def keep(self, removed: Mask) -> Keep:
        """Which atoms stay if those units go (a mask over all units)."""
        gone = np.append(removed, False)[self.unit_of]
        return lambda atoms: ~gone[atoms]

    @cached_property
    def work(self) -> list[tuple[int, list[Array]]]:
        """FLOPs of every call with the unit numbers along each axis its work grows with."""
        t, found = self.tracker, []
        for node in t.program.graph.nodes:
            flops = node_flops(node)
            if not flops:
                continue
            if node.target in LSTM:
                found += self._recurrent_work(node, flops)
                continue
            if node.target in (*LINEAR, *CONVOLUTIONS) and _is_stored(node.args[1]):
                axes = [factor.atoms for factor in _stored(t, node.args[1])]
            else:
                labels = t.labels.get(node, ())
                axes = [factor.atoms for factor in labels if isinstance(factor, Factor)]
            found.append((flops, [self.unit_of[atoms] for atoms in axes]))
        return found

    def _recurrent_work(self, node: fx.Node, flops: int) -> list[tuple[int, list[Array]]]:
        """FLOPs of each of the matrices of a recurrent call."""
        t = self.tracker
        matrices = [one for one in node.all_input_nodes
                    if _is_stored(one) and t.program.weight(one).dim() == 2]  # fmt: skip
        total = sum(t.program.weight(one).numel() for one in matrices)
        return [
            (
                flops // total * t.program.weight(one).numel(),
                [self.unit_of[factor.atoms] for factor in _stored(t, one)],
            )
            for one in matrices
        ]

    @cached_property
    def sizes(self) -> list[tuple[int, list[Array]]]:
        """Elements of every stored tensor, with the unit numbers along its axes."""
        t = self.tracker
        stored: dict[Any, fx.Node] = {}
        for node in t.program.graph.nodes:
            if node.op == "get_attr" and node.users and isinstance(node.meta.get("val"), Tensor):
                stored.setdefault(tensor_key(t.program.weight(node)), node)
        return [
            (t.program.weight(node).numel(), [self.unit_of[f.atoms] for f in _stored(t, node)])
            for node in stored.values()
        ]

    def flops(self, removed: Mask) -> float:
        """FLOPs on the example inputs without those units."""
        return _total(self.work, removed)

    def parameters(self, removed: Mask) -> float:
        """Elements of the stored tensors without those units."""
        return _total(self.sizes, removed)

    def would_empty(self, removed: Mask) -> bool:
        """Whether some axis would have no place left."""
        gone = np.append(removed, False)
        return any(bool(gone[units].all()) for units in self.arrays)


def _total(parts: list[tuple[int, list[Array]]], removed: Mask) -> float:
    stays = ~np.append(removed, False)
    share: dict[int, float] = {}
    total = 0.0
    for amount, axes in parts:
        for units in axes:
            if id(units) not in share:
                share[id(units)] = float(stays[units].mean())
            amount = amount * share[id(units)]  # type: ignore[assignment]
        total += amount
    return total


def _is_stored(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _stored(t: Tracker, reader: fx.Node) -> list[Factor]:
    key = tensor_key(t.program.weight(reader))
    rank = t.program.weight(reader).dim()
    return [
        Factor((axis,), t.weights[key, axis]) for axis in range(rank) if (key, axis) in t.weights
    ]


def find_coupling(program: Program, *, through_norms: bool = False) -> Coupling:
    """Analyse a program; nothing is edited.

    With ``through_norms`` the width of residual streams may shrink too: see mopt.axis_widths.
    """
    t = Tracker(program, through_norms=through_norms)
    for node in program.graph.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                t.freeze_all(t.of(source), f"{_RETURNED} ({source.name})")
        elif node.op == "call_function":
            t.labels[node] = apply_rule(t, node, _reason(node))
        elif node.op in ("call_module", "call_method"):
            for source in node.all_input_nodes:
                t.freeze_all(t.of(source), _reason(node))
    _freeze_overlaps(t)
    classes, reasons = t.classes()
    factors = _factors(t)
    for factor in factors:
        _check_shape(classes[factor.atoms], reasons)
    owned = np.zeros(t.count, dtype=bool)
    for atoms in t.weights.values():
        owned[classes[atoms]] = True
    number = np.full(t.count, -1, dtype=np.int64)
    free = [c for c in np.unique(classes).tolist() if c not in reasons and owned[c]]
    number[free] = np.arange(len(free))
    unit_of = number[classes] if t.count else number
    members = _members(t, unit_of)
    skips = _skips(t, classes, reasons)
    arrays = list(
        {units.tobytes(): units for units in (unit_of[f.atoms] for f in factors)}.values()
    )
    return Coupling(t, unit_of, len(free), _groups(members), skips, arrays)


def _reason(node: fx.Node) -> str:
    where = module_path(node)
    return f"{node.target} {f'in {where}' if where else node.name}"


def _freeze_overlaps(t: Tracker) -> None:
    """Tensors that share memory in different shapes stay as they are."""
    places: dict[Any, set[Any]] = {}
    for node in t.program.graph.nodes:
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor):
            key = tensor_key(t.program.weight(node))
            places.setdefault(key[0], set()).add(key)
    for keys in places.values():
        if len(keys) > 1:
            for key, axis in list(t.weights):
                if key in keys:
                    t.freeze(t.weights[key, axis], "its memory is shared in another shape")


def _factors(t: Tracker) -> list[Factor]:
    """Every array of atoms that some value or weight has, once."""
    found: dict[tuple[int, ...], Factor] = {}
    for labels in t.labels.values():
        for one in labels if isinstance(labels, list) else [labels]:
            for factor in one:
                atoms = factor.atoms
                place = (atoms.__array_interface__["data"][0], *atoms.shape, *atoms.strides)
                found.setdefault(place, factor)
    for (_, axis), atoms in t.weights.items():
        place = (atoms.__array_interface__["data"][0], *atoms.shape, *atoms.strides)
        found.setdefault(place, Factor((axis,), atoms))
    return list(found.values())


def _check_shape(classes: Array, reasons: dict[int, str]) -> None:
    """Every class must be whole slices along one axis of the array, and leave something."""
    if (classes == classes.flat[0]).all():
        reasons.setdefault(int(classes.flat[0]), _EMPTY)
    if classes.ndim == 1:
        return
    impure = []
    for axis in range(classes.ndim):
        rows = np.moveaxis(classes, axis, 0).reshape(classes.shape[axis], -1)
        mixed = rows.min(1) != rows.max(1)
        impure.append(set(np.unique(rows[mixed]).tolist()))
    for one in set.intersection(*impure):
        reasons.setdefault(one, _CROOKED)


def _members(t: Tracker, unit_of: Array) -> list[Member]:
    found, seen = [], set()
    for node in t.program.graph.nodes:
        if node.op != "call_function":
            continue
        for weight in node.all_input_nodes:
            if weight.op != "get_attr" or not isinstance(weight.meta.get("val"), Tensor):
                continue
            key = tensor_key(t.program.weight(weight))
            for axis in range(t.program.weight(weight).dim()):
                role = _role(node, weight, axis)
                if (key, axis) not in t.weights or (key, axis, role == "in", node) in seen:
                    continue
                seen.add((key, axis, role == "in", node))
                units = unit_of[t.weights[key, axis]]
                if (units >= 0).any():
                    found.append(Member(node, weight, axis, role, units))
    return found


def _role(node: fx.Node, weight: fx.Node, axis: int) -> str:
    if node.target in LSTM and len(weight.meta["val"].shape) == 2:
        return "in" if axis else "out"
    if node.target not in (*LINEAR, *CONVOLUTIONS) or node.args[1] is not weight:
        return "vector"
    transposed = "transpose" in str(node.target)
    return "out" if axis == (1 if transposed else 0) else "in"


def _groups(members: list[Member]) -> list[Group]:
    owners: dict[int, list[int]] = {}
    for at, member in enumerate(members):
        for unit in np.unique(member.units[member.units >= 0]).tolist():
            owners.setdefault(unit, []).append(at)
    alike: dict[tuple[int, ...], list[int]] = {}
    for unit, owning in owners.items():
        alike.setdefault(tuple(owning), []).append(unit)
    groups = []
    for places, units in alike.items():
        own = tuple(members[at] for at in places)
        if not any(member.role == "in" for member in own):
            continue
        writers = [m for m in own if m.role == "out"] or own
        width = min(int((m.units == units[0]).sum()) for m in writers)
        writer = writers[0]
        kind = "channels" if writer.call.target in CONVOLUTIONS else "neurons"
        kind = "heads" if width > 1 and kind == "neurons" else kind
        if writer.call.target in LSTM:  # four gates write each unit
            kind, width = "hidden units", 1
        elif any("norm" in str(m.call.target) and kind == "neurons" for m in own):
            kind = "stream channels"
        path = module_path(writer.call) or writer.call.name
        groups.append(Group(path, kind, np.array(sorted(units), dtype=np.int64), width, own))
    return groups


def _skips(t: Tracker, classes: Array, reasons: dict[int, str]) -> list[Skip]:
    """Layers of which nothing that they write can be removed, with the first reason."""
    skips: dict[str, Skip] = {}
    for node in t.program.graph.nodes:
        if node.target not in (*LINEAR, *CONVOLUTIONS) or not _is_stored(node.args[1]):
            continue
        key = tensor_key(t.program.weight(node.args[1]))
        atoms = t.weights.get((key, 1 if "transpose" in str(node.target) else 0))
        if atoms is None:
            continue
        kept = [reasons.get(int(one)) for one in classes[atoms]]
        first = next((why for why in kept if why), None)
        if first is not None and all(kept):
            site = module_path(node) or site_of(node)
            skips.setdefault(site, Skip(site, f"kept whole: {first}"))
    return list(skips.values())


def shrink(program: Program, found: Coupling, removed: Mask) -> dict[str, Array]:
    """Remove units: slice every weight they own, and write the new lengths into the graph.

    ``found`` must be of this program. Returns, per layer call that writes fewer channels now, which
    of them it kept. Weights are replaced, never written to.
    """
    t, keep = found.tracker, found.keep(removed)
    assert t.program is program
    kept: dict[str, Array] = {}
    for node in program.graph.nodes:
        if node.target in (*LINEAR, *CONVOLUTIONS):
            labels = t.labels[node]
            axis = len(t.shape(node)) - 1 if node.target in LINEAR else 1
            factor = next((f for f in labels if isinstance(f, Factor) and f.axes == (axis,)), None)
            if factor is not None and not keep(factor.atoms).all():
                kept[node.name] = np.flatnonzero(keep(factor.atoms))
    for key, readers in t.readers.items():
        tensor = program.weight(readers[0])
        sliced = tensor
        for axis in range(tensor.dim()):
            atoms = t.weights.get((key, axis))
            if atoms is not None and not keep(atoms).all():
                places = np.flatnonzero(keep(atoms))
                sliced = sliced.index_select(axis, _index(places, tensor))
        if sliced is tensor:
            continue
        stored = None
        for reader in readers:
            if stored is None:
                stored = program.add_weight(f"{reader.target}_pruned", sliced, reader)
                replacement = stored
            else:
                with program.graph.inserting_before(reader):
                    replacement = program.graph.get_attr(str(stored.target))
                replacement.meta["val"] = stored.meta["val"]
            reader.replace_all_uses_with(replacement)
            program.graph.erase_node(reader)
    for rewrite in t.rewrites:
        rewrite(keep)
    program.refresh()
    return kept


def _index(places: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(places).to(like.device)
