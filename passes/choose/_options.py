"""What every layer may become: groups that must agree, formats, bytes and time, and what is out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from mopt.cost import CostModel, LayerRequest
from mopt.effects import argument
from mopt.errors import UsageError
from mopt.flops import ModelSize, size_hint
from mopt.formats import find_format
from mopt.formats.int_blocks import IntBlocks
from mopt.formats.low_rank import LowRank
from mopt.layer_request import layer_request
from mopt.layers import Layer, find_layers
from mopt.machine import machine_fingerprint
from mopt.program import Program

ORIGINAL = "original"
STATIC = ("int8-qdq", "int8-qdq-reduced")
_SHARED_CODES = ("int8-dynamic", "int8-dynamic-reduced", "int8-row")
# An estimate slower by less than this share of all layers' time is no reason to refuse a format.
_NOISE = 1e-3


@dataclass
class Option:
    """What a group may become: a format per layer path (none for the original).

    ``loss`` is filled in once it is known; ``loss_source`` says how: exact or estimated.
    ``latency_source`` is measured where this very layer was timed in this format, else estimated.
    ``border_ms`` is the part of the time that converts values for neighbours computed in float.
    ``memory_bytes`` are those of the weights while the model runs. ``energy_mj`` is None where the
    target's profile has no energies.
    """

    name: str
    formats: Mapping[str, str]
    size_bytes: float
    latency_ms: float
    loss: float = 0.0
    loss_source: str = "exact"
    latency_source: str = "estimated"
    border_ms: float = 0.0
    memory_bytes: float = 0.0
    energy_mj: float | None = None


@dataclass(frozen=True)
class Run:
    """What a layer's calls take in a format: ms, mJ if known, and how the time is known."""

    latency_ms: float
    energy_mj: float | None
    source: str


_UNKNOWN = Run(0.0, None, "estimated")


@dataclass
class Sites:
    """Layers that must agree, their options (the original first), and what was refused and why.

    ``slower`` are the options that were refused for their time alone. ``model`` is the size of the
    whole model before the first pass.
    """

    name: str
    layers: tuple[Layer, ...]
    model: ModelSize
    options: list[Option] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    slower: list[Option] = field(default_factory=list)

    def refuse_slower(self, option: Option, how: str, latency_ms: float) -> None:
        """Take an option out for its time; it is kept in mind, in case slower is allowed."""
        before = self.options[0].latency_ms
        self.refused[option.name] = f"{how}: {latency_ms:.3g} ms, the original {before:.3g} ms"
        self.slower.append(option)


def read_sites(program: Program, selects: Any, min_size: int) -> tuple[list[Sites], dict[str, str]]:
    """The groups of layers a choice is made for, and the reason for each layer left alone.

    Layers that read one value agree, because a runtime rounds it once for all of them; so do layers
    that share a weight, because it would be stored twice otherwise.
    """
    left: dict[str, str] = {}
    taken: list[Layer] = []
    for layer in find_layers(program):
        weight = program.weight(layer.weight)
        if not selects(layer.path):
            left[layer.path] = "the options layers and skip leave it out"
        elif layer.kind != "convolution" and prod(layer.shape) < min_size:
            left[layer.path] = f"{prod(layer.shape)} weights are fewer than min_size {min_size}"
        elif weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            left[layer.path] = f"its weight is {kind}, formats are chosen for float32"
        else:
            taken.append(layer)
    groups: list[list[Layer]] = []
    place: dict[Any, list[Layer]] = {}
    for layer in taken:
        keys: list[Any] = [("weight", str(layer.weight.target))]
        if layer.kind == "linear" and len(layer.calls) == 1:
            keys.append(("input", layer.calls[0].args[0], layer.shape[1]))
        known = next((place[key] for key in keys if key in place), None)
        if known is None:
            known = []
            groups.append(known)
        known.append(layer)
        place.update(dict.fromkeys(keys, known))
    whole = program.original_size()
    return [Sites(group[0].path, tuple(group), whole) for group in groups], left


def format_names(
    kind: str, *, given: Sequence[str], with_static: bool, with_stored: bool, with_ranks: bool
) -> list[str]:
    """The formats to consider for a kind of layer; ``given`` are the user's own.

    ``with_stored`` asks for formats that only make the file smaller, ``with_ranks`` for low ranks.
    """
    if given:
        return [name for name in given if kind in find_format(name).kinds]
    suffix = "" if _adds_without_saturation() else "-reduced"
    static = [f"int8-qdq{suffix}"] if with_static else []
    half = ["fp16"] if with_stored else []
    if kind == "embedding":
        return ["int8-row", *half]
    if kind == "convolution":
        return [*static, *(["int8-stored"] if with_stored else []), *half]
    grouped = ["int8-g128", "int4-g32", "int4-g128"]
    ranks = ["low-rank-50", "low-rank-25"] if with_ranks else []
    return [f"int8-dynamic{suffix}", *grouped, *static, *half, *ranks]


def _adds_without_saturation() -> bool:
    """Whether int8 products are summed in 32 bits here: not on x86 without VNNI."""
    isa = machine_fingerprint()["isa"]
    return "avx2" not in isa or any("vnni" in flag or "amx" in flag for flag in isa)


def requests(sites: Sequence[Sites], names: Mapping[str, Sequence[str]]) -> list[LayerRequest]:
    """Everything that will be asked of the cost model, originals included."""
    found = []
    for one in sites:
        for layer in one.layers:
            for name in dict.fromkeys(("fp32", *names[layer.kind])):
                found += [asked for call in layer.calls
                          for asked in _requests(layer, call, name, one)]  # fmt: skip
    return found


def fill_options(
    program: Program, sites: Sequence[Sites], names: Mapping[str, Sequence[str]],
    model: CostModel | None, *, allow_slower: bool,
) -> None:  # fmt: skip
    """Give every group its options with bytes and ms; refuse what cannot run or is slower."""
    total = 0.0
    for one in sites:
        runs = [_run(model, layer, "fp32", one) or _UNKNOWN for layer in one.layers]
        bytes_ = _bytes(program, one, {})
        whole = _joined_runs(runs)
        one.options.append(
            Option(
                ORIGINAL, {}, bytes_, whole.latency_ms, latency_source=whole.source,
                memory_bytes=bytes_, energy_mj=whole.energy_mj,
            )
        )  # fmt: skip
        total += whole.latency_ms
    for one in sites:
        wanted = dict.fromkeys(name for layer in one.layers for name in names[layer.kind])
        for name in _joined(one, list(wanted)):
            _add_option(program, one, name, model, _NOISE * total, allow_slower)


def _joined_runs(runs: Sequence[Run]) -> Run:
    energies = [run.energy_mj for run in runs]
    return Run(
        sum(run.latency_ms for run in runs),
        None if None in energies else sum(e for e in energies if e is not None),
        _worst({run.source for run in runs}),
    )


def _worst(sources: set[str]) -> str:
    return "measured" if sources == {"measured"} else "estimated"


def _joined(one: Sites, wanted: list[str]) -> list[str]:
    """Where a table and a linear share their weight, only formats that both can read at once."""
    kinds = {layer.kind for layer in one.layers}
    if len(kinds) == 1:
        return wanted
    for name in wanted:
        if name not in _SHARED_CODES and not name.startswith("fp16"):
            one.refused[name] = "its weight is also a table, which would be stored a second time"
    return [name for name in wanted if name not in one.refused and name != "int8-row"]


def _add_option(
    program: Program, one: Sites, name: str, model: CostModel | None, noise: float,
    allow_slower: bool,
) -> None:  # fmt: skip
    formats: dict[str, str] = {}
    border = 0.0
    runs: list[Run] = []
    for layer in one.layers:
        own = "int8-row" if layer.kind == "embedding" and name in _SHARED_CODES else name
        reason = find_format(own).check(layer, program.weight(layer.weight))
        if reason is None:
            found = _run(model, layer, own, one)
            if found is None:
                reason = "the target has no kernel for it"
            else:
                runs.append(found)
                if own in STATIC:
                    among = _run(model, layer, own, one, alone=False) or found
                    border += found.latency_ms - among.latency_ms
        if reason is not None:
            one.refused[name] = reason
            return
        formats[layer.path] = own
    whole = _joined_runs(runs)
    latency, source = whole.latency_ms, whole.source
    size = _bytes(program, one, formats)
    widened = any(_is_widened(layer, call, formats[layer.path], one.model)
                  for layer in one.layers for call in layer.calls)  # fmt: skip
    option = Option(
        name, formats, size, latency, latency_source=source, border_ms=max(border, 0.0),
        memory_bytes=one.options[0].memory_bytes if widened else size, energy_mj=whole.energy_mj,
    )  # fmt: skip
    # Between neighbours in 8 bits nothing is converted: the choice as a whole tells.
    if latency - border > one.options[0].latency_ms + noise and not allow_slower:
        one.refuse_slower(option, f"{source} slower", latency - border)
    else:
        one.options.append(option)


def _bytes(program: Program, one: Sites, formats: Mapping[str, str]) -> float:
    """Bytes of the group's weights, one that several layers share in one format once."""
    seen: dict[tuple[str, str], int] = {}
    for layer in one.layers:
        name = formats.get(layer.path, ORIGINAL)
        weight = program.weight(layer.weight)
        size = weight.numel() * weight.element_size()
        if name != ORIGINAL:
            size = find_format(name).size_bytes(layer.shape, weight.dtype)
        key = "codes" if name in _SHARED_CODES else name
        seen.setdefault((str(layer.weight.target), key), size)
    return float(sum(seen.values()))


def _run(
    model: CostModel | None, layer: Layer, name: str, one: Sites, *, alone: bool = True
) -> Run | None:
    """What all calls of a layer take, None where there is no kernel.

    ``alone`` counts the conversions of a layer in 8 bits between float ones.
    """
    if model is None:
        return _UNKNOWN
    runs = []
    for asked in (asked for call in layer.calls for asked in _requests(layer, call, name, one)):
        try:
            cost = model.layer_cost(
                asked.kind, asked.shape, asked.weight_format, rows=asked.rows,
                sharers=asked.sharers, geometry=asked.geometry, isolated=alone,
            )  # fmt: skip
        except UsageError as error:
            if error.code in ("no-kernel", "no-processor"):
                return None
            raise
        source = "measured" if cost.level == "measured" else "estimated"
        runs.append(Run(cost.milliseconds, cost.energy_mj, source))
    return _joined_runs(runs)


def requests_at(layer: Layer, name: str, one: Sites, shape: tuple[int, ...]) -> list[LayerRequest]:
    """What all calls of a layer would ask of a cost model if its weight had another shape."""
    narrow = replace(layer, shape=shape)
    return [asked for call in layer.calls for asked in _requests(narrow, call, name, one)]


def format_run(
    model: CostModel, layer: Layer, name: str, one: Sites, shape: tuple[int, ...]
) -> Run:
    """What a layer's calls take in a format if its weight had another shape."""
    return _run(model, replace(layer, shape=shape), name, one) or _UNKNOWN


def _requests(layer: Layer, call: Any, name: str, one: Sites) -> list[LayerRequest]:
    """What a call of a layer in a format executes."""
    form = find_format(name) if name not in (ORIGINAL, "fp32") else None
    if isinstance(form, LowRank):
        (outputs, inputs), rank = layer.shape, form.rank(layer.shape)
        first = LayerRequest("linear", (rank, inputs), rows=_rows(call), geometry={"bias": False})
        return [first, replace(layer_request(call, (outputs, rank)), rows=_rows(call))]
    return [_request(layer, call, name, one)]


def _request(layer: Layer, call: Any, name: str, one: Sites) -> LayerRequest:
    name = "fp32" if _is_widened(layer, call, name, one.model) else name
    sharers = sum(other.kind == "linear" for other in one.layers) if layer.kind == "linear" else 1
    if layer.kind == "embedding":
        return LayerRequest(layer.kind, tuple(layer.shape), name, _rows(call))
    groups = _convolution_groups(layer, call) if layer.kind == "convolution" else None
    return replace(layer_request(call, layer.shape, groups), weight_format=name, sharers=sharers)


def _convolution_groups(layer: Layer, call: Any) -> int:
    """The groups of a convolution; of one asked about at another width, as many of those stay."""
    groups = int(argument(call, "groups"))
    outputs = size_hint(layer.weight.meta["val"].shape[0])
    return max(1, groups * layer.shape[0] // outputs) if groups > 1 else 1


def _is_widened(layer: Layer, call: Any, name: str, model: ModelSize) -> bool:
    """Whether weights are widened when the model is loaded: the runtime multiplies floats."""
    if name in ("fp16", "bf16", "int8-stored"):
        return True
    form = find_format(name) if name not in (ORIGINAL, "fp32") else None
    return isinstance(form, IntBlocks) and not form.keeps_codes(_rows(call), layer.shape, model)


def _rows(call: Any) -> int:
    """Vectors a linear layer or a table is applied to, on the example inputs."""
    return prod(size_hint(size) for size in call.meta["val"].shape[:-1])
