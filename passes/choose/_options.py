"""What every layer may become: groups that must agree, formats, bytes and time, and what is out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from mopt.cost import CostModel
from mopt.errors import UsageError
from mopt.flops import size_hint
from mopt.formats import find_format
from mopt.formats.base import argument
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
    """

    name: str
    formats: Mapping[str, str]
    size_bytes: float
    latency_ms: float
    loss: float = 0.0
    loss_source: str = "exact"


@dataclass
class Sites:
    """Layers that must agree, their options (the original first), and what was refused and why."""

    name: str
    layers: tuple[Layer, ...]
    options: list[Option] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


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
        elif prod(layer.shape) < min_size:
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
    return [Sites(group[0].path, tuple(group)) for group in groups], left


def format_names(
    kind: str, *, given: Sequence[str], with_static: bool, with_half: bool
) -> list[str]:
    """The formats to consider for a kind of layer; ``given`` are the user's own."""
    if given:
        return [name for name in given if kind in find_format(name).kinds]
    suffix = "" if _adds_without_saturation() else "-reduced"
    static = [f"int8-qdq{suffix}"] if with_static else []
    half = ["fp16"] if with_half else []
    if kind == "embedding":
        return ["int8-row", *half]
    if kind == "convolution":
        return [*static, *half]
    grouped = ["int8-g128", "int4-g32", "int4-g128"]
    return [f"int8-dynamic{suffix}", *grouped, *static, *half]


def _adds_without_saturation() -> bool:
    """Whether int8 products are summed in 32 bits here: not on x86 without VNNI."""
    isa = machine_fingerprint()["isa"]
    return "avx2" not in isa or any("vnni" in flag or "amx" in flag for flag in isa)


def fill_options(
    program: Program, sites: Sequence[Sites], names: Mapping[str, Sequence[str]],
    model: CostModel | None, *, allow_slower: bool,
) -> None:  # fmt: skip
    """Give every group its options with bytes and ms; refuse what cannot run or is slower."""
    total = 0.0
    for one in sites:
        latency = sum(_latency(model, layer, "fp32", one) or 0.0 for layer in one.layers)
        one.options.append(Option(ORIGINAL, {}, _bytes(program, one, {}), latency))
        total += latency
    for one in sites:
        wanted = dict.fromkeys(name for layer in one.layers for name in names[layer.kind])
        for name in _joined(one, list(wanted)):
            _add_option(program, one, name, model, _NOISE * total, allow_slower)


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
    latency = 0.0
    for layer in one.layers:
        own = "int8-row" if layer.kind == "embedding" and name in _SHARED_CODES else name
        reason = find_format(own).check(layer, program.weight(layer.weight))
        if reason is None:
            found = _latency(model, layer, own, one)
            reason = "the target has no kernel for it" if found is None else None
            latency += found or 0.0
        if reason is not None:
            one.refused[name] = reason
            return
        formats[layer.path] = own
    before = one.options[0].latency_ms
    if latency > before + noise and not allow_slower:
        one.refused[name] = f"estimated slower: {latency:.3g} ms, the original {before:.3g} ms"
        return
    one.options.append(Option(name, formats, _bytes(program, one, formats), latency))


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


def _latency(model: CostModel | None, layer: Layer, name: str, one: Sites) -> float | None:
    """Estimated ms of all calls of a layer, None where the target cannot compute with it."""
    if model is None:
        return 0.0
    # 16-bit weights are widened when the model is loaded: the runtime multiplies floats.
    name = "fp32" if name in ("fp16", "bf16") else name
    sharers = sum(other.kind == "linear" for other in one.layers) if layer.kind == "linear" else 1
    total = 0.0
    for call in layer.calls:
        try:
            cost = model.layer_cost(
                layer.kind, layer.shape, name, rows=_rows(layer, call), sharers=sharers,
                geometry=_geometry(layer, call),
            )  # fmt: skip
        except UsageError as error:
            if error.code in ("no-kernel", "no-processor"):
                return None
            raise
        total += cost.milliseconds
    return total


def _rows(layer: Layer, call: Any) -> int:
    """Vectors the layer is applied to, on the example inputs."""
    shape = [size_hint(size) for size in call.meta["val"].shape]
    if layer.kind == "convolution":
        return shape[0] * prod(shape[2:])
    return prod(shape[:-1])


def _geometry(layer: Layer, call: Any) -> dict[str, Any] | None:
    if layer.kind != "convolution":
        return None
    shape = [size_hint(size) for size in call.meta["val"].shape]
    transposed = "transpose" in str(call.target)
    groups = argument(call, 7 if transposed else 6, "groups") or 1
    stride = argument(call, 3, "stride") or 1
    if not isinstance(stride, int):
        stride = tuple(stride) * (len(shape) - 2) if len(stride) == 1 else tuple(stride)
    return {"batch": shape[0], "output": tuple(shape[2:]), "stride": stride, "groups": int(groups)}
