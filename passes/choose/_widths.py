"""Widths as candidates: fewer channels, neurons or heads, chosen together with formats.

Each group of coupled units is a choice of its own in the program, with amounts counted on layers
in their original format. What a width is worth to a layer in another format differs: those
differences are pair terms between the width and the format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import fx

from mopt import coupling
from mopt.axes import Mask
from mopt.cache import source_hash
from mopt.cost import CostModel, LayerRequest
from mopt.coupling import Group, find_coupling, shrink
from mopt.formats import find_format
from mopt.ladder import Ladder
from mopt.layer_request import preferred_multiple
from mopt.layers import Layer
from mopt.pass_base import PassContext
from mopt.passes.choose._options import ORIGINAL, Option, Sites, format_run, requests_at
from mopt.passes.choose._program import Pair
from mopt.passes.choose._sensitivity import Losses
from mopt.program import Program, module_path
from mopt.refit import refit
from mopt.unit_scores import collect_moments, output_scores

# What is kept of a group, in percent.
KEPT = (75, 50)
_PREFIX = "width-"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Crossing:
    """What a width of one group and a format of another add together, by names of options."""

    format_group: int
    format_option: str
    width_group: int
    width_option: str
    amounts: Mapping[str, float]


@dataclass
class Width:
    """A group of units: the choice it is in the program, and what goes with each option."""

    group: Group
    sites: Sites
    removed: dict[str, Mask]


@dataclass
class Widths:
    """All groups of a program that may become narrower."""

    program: Program
    unit_count: int
    found: list[Width]

    @staticmethod
    def none(program: Program) -> Widths:
        """No group may."""
        return Widths(program, 0, [])

    def sites(self) -> list[Sites]:
        """The choices, to stand behind those of formats."""
        return [one.sites for one in self.found]

    def removed(self, chosen: Sequence[str]) -> Mask:
        """All units that go, given the option of each group."""
        mask = np.zeros(self.unit_count, dtype=bool)
        for one, name in zip(self.found, chosen, strict=True):
            if name != ORIGINAL:
                mask |= one.removed[name]
        return mask

    def apply(self, program: Program, chosen: Sequence[str], ctx: PassContext) -> None:
        """Make ``program``, a copy of the one asked about, narrower; fit what reads it again."""
        removed = self.removed(chosen)
        if removed.any():
            remove(program, removed, ctx)

    def explain(self, chosen: Sequence[str]) -> list[dict[str, Any]]:
        """What the report says of every group."""
        return [
            {
                "path": one.group.path, "kind": one.group.kind, "of": len(one.group.units),
                "kept": len(one.group.units) - int(one.removed[name].sum())
                if name in one.removed else len(one.group.units),
                "chosen": name,
                "candidates": [
                    {"width": o.name, "size_bytes": o.size_bytes, "latency_ms": o.latency_ms,
                     "loss": o.loss, "loss_source": o.loss_source}
                    for o in one.sites.options
                ],
                "refused": dict(one.sites.refused),
            }
            for one, name in zip(self.found, chosen, strict=True)
        ]  # fmt: skip


def remove(program: Program, removed: Mask, ctx: PassContext | None) -> None:
    """Take units out of a program; with a context, fit what read them to the original outputs."""
    original = program.copy()
    kept = shrink(program, find_coupling(program), removed)
    if ctx is not None and ctx.calibration is not None:
        refit(program, original, kept, replace(ctx, observations=()))


def find_widths(program: Program, ctx: PassContext, selects: Callable[[str], bool]) -> Widths:
    """The groups that may become narrower, each with what would go; nothing is priced yet.

    The units that matter least by what their readers' outputs lose go first.
    """
    assert ctx.cost_model is not None
    found = find_coupling(program)
    widths: list[Width] = []
    groups = [g for g in found.groups if all(selects(path) for path in _writers(g))]
    if not groups:
        return Widths.none(program)
    scores = output_scores(
        program, found, collect_moments(program, found, ctx), reconstruct=True
    )  # fmt: skip
    for group in groups:
        multiple = preferred_multiple(
            ctx.cost_model, "convolution" if group.kind == "channels" else "linear"
        )
        ladder = Ladder.of(group, scores, multiple, 1 - min(KEPT) / 100)
        removed: dict[str, Mask] = {}
        for percent in KEPT:
            count = ladder.nearest(1 - percent / 100)
            mask = np.zeros(found.unit_count, dtype=bool)
            mask[ladder.order[:count]] = True
            if count and not any((mask == other).all() for other in removed.values()):
                removed[f"{_PREFIX}{percent}"] = mask
        if removed:
            site = Sites(f"width of {group.path}", (), program.original_size())
            widths.append(Width(group, site, removed))
    return Widths(program, found.unit_count, widths)


def _writers(group: Group) -> set[str]:
    writers = {module_path(m.call) or m.call.name for m in group.of_role("out")}
    return writers or {group.path}


# ---- sizes and times


def price(
    widths: Widths, sites: Sequence[Sites], model: CostModel, *, allow_slower: bool,
    report: Callable[[int, int], None],
) -> list[Crossing]:  # fmt: skip
    """Give every group its options with bytes and ms; what they add to the formats of layers.

    Widths that would not be faster are refused.
    """
    touched = [_touched(widths, one, sites) for one in widths.found]
    asked: list[LayerRequest] = []
    for one, layers in zip(widths.found, touched, strict=True):
        for name in one.removed:
            for place, layer, shapes in layers:
                for option in sites[place].options:
                    form = option.formats.get(layer.path, "fp32")
                    asked += requests_at(layer, form, sites[place], shapes[name])
    model.prepare(asked, report)
    found: list[Crossing] = []
    for at, (one, layers) in enumerate(zip(widths.found, touched, strict=True)):
        one.sites.options = [Option(ORIGINAL, {}, 0.0, 0.0, energy_mj=0.0)]
        for name in list(one.removed):
            plain = [_change(widths, model, sites[p], layer, "fp32", shapes[name])
                     for p, layer, shapes in layers]  # fmt: skip
            total = _summed([*plain, _vectors(widths.program, one.group, one.removed[name])])
            if total["latency"] >= 0 and not allow_slower:
                one.sites.refused[name] = "not faster at that width"
                del one.removed[name]
                continue
            one.sites.options.append(_option(name, total))
            found += _crossings(widths, model, sites, at, name, layers)
    return found


def _option(name: str, amounts: Mapping[str, float]) -> Option:
    return Option(
        name, {}, amounts["size"], amounts["latency"], memory_bytes=amounts["memory"],
        energy_mj=amounts["energy"], loss_source="estimated",
    )  # fmt: skip


def crossed(
    sites: Sequence[Sites], narrower: Sequence[Sites], found: Sequence[Crossing]
) -> list[Pair]:
    """The crossings of the options that are there, as pairs; widths stand behind formats."""
    of_formats = [{o.name: i for i, o in enumerate(one.options)} for one in sites]
    of_widths = [{o.name: i for i, o in enumerate(one.options)} for one in narrower]
    return [
        Pair(
            one.format_group, of_formats[one.format_group][one.format_option],
            len(sites) + one.width_group, of_widths[one.width_group][one.width_option],
            one.amounts,
        )
        for one in found
        if one.format_option in of_formats[one.format_group]
        and one.width_option in of_widths[one.width_group]
    ]  # fmt: skip


def _crossings(
    widths: Widths, model: CostModel, sites: Sequence[Sites], place: int, name: str,
    layers: Sequence[tuple[int, Layer, Mapping[str, Shape]]],
) -> list[Crossing]:  # fmt: skip
    crossings = []
    for at in dict.fromkeys(p for p, _, _ in layers):
        own = [(layer, shapes[name]) for p, layer, shapes in layers if p == at]
        plain = _summed([_change(widths, model, sites[at], x, "fp32", s) for x, s in own])
        for option in sites[at].options[1:]:
            found = _summed([
                _change(widths, model, sites[at], x, option.formats.get(x.path, "fp32"), s)
                for x, s in own
            ])  # fmt: skip
            # Memory follows the bytes that are stored, or those of floats that are widened.
            widened = option.memory_bytes == sites[at].options[0].memory_bytes
            found["memory"] = plain["memory"] if widened else found["size"]
            amounts = {q: found[q] - plain[q] for q in plain}
            crossings.append(Crossing(at, option.name, place, name, amounts))
    return crossings


def _touched(
    widths: Widths, one: Width, sites: Sequence[Sites]
) -> list[tuple[int, Layer, dict[str, Shape]]]:
    """The layers a group is about: where their choice stands, and their shape in each width."""
    places = {id(layer): at for at, site in enumerate(sites) for layer in site.layers}
    layers: dict[fx.Node, Layer] = {call: layer for site in sites for layer in site.layers
                                    for call in layer.calls}  # fmt: skip
    found: dict[int, tuple[Layer, dict[str, Shape]]] = {}
    for member in one.group.members:
        layer = layers.get(member.call)
        if layer is None or member.role == "vector":
            continue
        _, shapes = found.setdefault(id(layer), (layer, {}))
        for name, mask in one.removed.items():
            gone = int(np.append(mask, False)[member.units].sum())
            shape = list(shapes.get(name, tuple(layer.shape)))
            shape[member.axis] -= gone
            shapes[name] = tuple(shape)
    return [(places[key], layer, shapes) for key, (layer, shapes) in found.items()]


def _change(
    widths: Widths, model: CostModel, site: Sites, layer: Layer, form: str, shape: Shape
) -> dict[str, float]:
    """What a layer in a format takes less at another shape, by quantity."""
    weight = widths.program.weight(layer.weight)
    before, after = (
        format_run(model, layer, form, site, one) for one in (tuple(layer.shape), shape)
    )
    if form == "fp32":
        sizes = [weight.element_size() * int(np.prod(s)) for s in (layer.shape, shape)]
    else:
        known = find_format(form)
        sizes = [known.size_bytes(s, weight.dtype) for s in (tuple(layer.shape), shape)]
    size = float(sizes[1] - sizes[0])
    energy = 0.0
    if before.energy_mj is not None and after.energy_mj is not None:
        energy = after.energy_mj - before.energy_mj
    latency = after.latency_ms - before.latency_ms
    return {"size": size, "memory": size, "latency": latency, "energy": energy}


def _vectors(program: Program, group: Group, removed: Mask) -> dict[str, float]:
    """What biases and norms take less without some units."""
    gone = np.append(removed, False)
    stored: dict[str, float] = {}
    for member in group.members:
        if member.role == "vector":
            tensor = program.weight(member.weight)
            share = float(gone[member.units].mean())
            stored[str(member.weight.target)] = -share * tensor.numel() * tensor.element_size()
    size = sum(stored.values())
    return {"size": size, "memory": size, "latency": 0.0, "energy": 0.0}


def _summed(amounts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    quantities = ("size", "memory", "latency", "energy")
    return {q: sum(one[q] for one in amounts) for q in quantities}


# ---- losses


def fill_losses(widths: Widths, losses: Losses, ctx: PassContext) -> None:
    """What every width costs: measured alone, scaled by what all of them cost together.

    Narrower layers make each other's errors worse, and fitting their readers again makes them
    smaller: one measurement with all groups at a width tells both.
    """
    work = [(one, option) for one in widths.found for option in one.sites.options[1:]]
    for index, (one, option) in enumerate(work):
        ctx.progress.step(index, len(work), "widths of layers")
        option.loss = _loss(losses, one.removed[option.name], fitted=False)
    names = list(dict.fromkeys(option.name for _, option in work))
    for index, name in enumerate(names):
        ctx.progress.step(index, len(names), "narrower layers together")
        own = [(one, option) for one, option in work if option.name == name]
        mask = np.logical_or.reduce([one.removed[name] for one, _ in own])
        alone = sum(option.loss for _, option in own)
        factor = _loss(losses, mask, fitted=True) / alone if alone else 0.0
        for _, option in own:
            option.loss *= factor
            option.loss_source = "exact" if len(own) == 1 else "estimated"


def _loss(losses: Losses, mask: Mask, *, fitted: bool) -> float:
    key = {
        "width": np.flatnonzero(mask).tolist(), "fitted": fitted,
        "width_source": source_hash(__file__, coupling.__file__ or ""),
    }  # fmt: skip

    def change(program: Program, ctx: PassContext) -> None:
        remove(program, mask, ctx if fitted else None)

    return losses.changed(change, key)
