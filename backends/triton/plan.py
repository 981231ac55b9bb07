"""Plans a lowering: which calls go to kernels, with which tiles, as which binaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mopt.backends.triton.aot import Binary
from mopt.backends.triton.architectures import ARCHITECTURES, NVIDIA, Architecture
from mopt.backends.triton.chains import VIEWS, chained_calls
from mopt.backends.triton.interpreter import run_interpreted
from mopt.backends.triton.kernel import Problem
from mopt.backends.triton.launch import Launch, Tile
from mopt.backends.triton.layers import KernelLayer, StoredTiles, TileTable, table_key
from mopt.backends.triton.rewrite import Left, Site
from mopt.backends.triton.tiles import Chip, Rejected, chip_of, choose
from mopt.backends.triton.values import values_as_json
from mopt.cache import Cache
from mopt.device import DeviceProfile, find_device
from mopt.errors import LoweringError
from mopt.flops import node_flops, shape_of
from mopt.program import site_of

# The device whose numbers choose tiles for an architecture that is not the target's.
_TYPICAL = {"sm_80": "a100", "sm_89": "l4", "sm_90": "h100", "gfx942": "mi300x"}
# Outputs that each kernel is checked with.
_CHECKED_OUTPUTS = 48
# The largest error of a checked kernel relative to the largest output, by the input's type. Both
# sides round inputs and weights in the type itself; what is left is the order of additions.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


MakeTimer = Callable[[KernelLayer, torch.dtype, Architecture], Callable[[int, Tile], float]]


@dataclass
class Lowered:
    """One call that goes to a kernel."""

    site: str
    name: str
    table: str
    flops: int


@dataclass
class Plan:
    """Everything a lowering decided. ``tables``: architecture, problem, bucket of rows, tile.

    ``share`` is that of the estimated time in kernels, ``pytorch`` what runs beside them;
    ``values`` are the types and shapes that patterns ask for when the model is loaded;
    ``measured`` the seconds of tiles that were timed: problem, bucket of rows, tile.
    """

    target: str
    lowered: list[Lowered] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)
    tables: dict[str, dict[str, dict[int, Tile]]] = field(default_factory=dict)
    binaries: dict[str, dict[str, Binary]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    checked: dict[str, float] = field(default_factory=dict)
    share: float = 0.0
    pytorch: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)


def architectures_for(target: Architecture) -> list[Architecture]:
    """The target's first, then those of the same maker: an artifact runs on other chips too."""
    others = [ARCHITECTURES[n] for n in NVIDIA] if target.is_nvidia else [target]
    return [target, *(arch for arch in others if arch is not target)]


def make_plan(
    sites: Sequence[Site], left: Sequence[Left], graph: fx.Graph, target: Architecture,
    device: DeviceProfile, cache: Cache | None, timer: MakeTimer | None = None,
) -> Plan:  # fmt: skip
    """Choose tiles, compile them and check every kernel once on this model's own weights.

    ``timer`` makes what times tiles of a layer for the target; without it they are estimated.
    """
    plan = Plan(target.name, values=values_as_json(graph))
    distinct: dict[str, tuple[Site, KernelLayer, torch.dtype]] = {}
    for site in sites:
        layer, dtype = site.make(0), site.dtype
        key = table_key(layer.problem(1, dtype))
        distinct.setdefault(key, (site, layer, dtype))
        flops = sum(node_flops(node) for node in site.nodes)
        plan.lowered.append(Lowered(site_of(site.node), layer.kernel.name, key, flops))
    for one in left:
        plan.left.append((site_of(one.node), str(one.node.target), one.reason))
    for arch in architectures_for(target):
        profile = device if arch is target else find_device(_TYPICAL[arch.name])
        for key, (_, layer, dtype) in distinct.items():
            try:
                timed = timer(layer, dtype, arch) if timer and arch is target else None
                _add(plan, key, layer, dtype, arch, profile, cache, timed)
            except LoweringError as error:
                # Only the target must be served; elsewhere such a call is compiled when it comes.
                if arch is target or error.code != "no-legal-tile":
                    raise
                plan.rejected.append(Rejected(key, arch.name, "all", str(error.hint)))
    done: set[str] = set()
    tiles = StoredTiles(plan.tables.get(target.name, {}))
    for key, (site, layer, dtype) in distinct.items():
        kind = _kind(layer, dtype)
        if kind not in done:
            done.add(kind)
            plan.checked[key] = check(site, layer, tiles)
    plan.share, plan.pytorch = operators_left(graph, sites, chip_of(device))
    return plan


def _add(
    plan: Plan, key: str, layer: KernelLayer, dtype: torch.dtype, arch: Architecture,
    profile: DeviceProfile, cache: Cache | None, timer: Callable[[int, Tile], float] | None,
) -> None:  # fmt: skip
    def launches(rows: int, config: Tile) -> list[Launch]:
        return layer.launches(rows, dtype, config)

    problems = {rows: layer.problem(rows, dtype) for rows in layer.buckets}
    found = choose(problems, layer.kernel, launches, arch, chip_of(profile), cache, timer)
    if found.measured:
        plan.measured[key] = found.measured
    plan.tables.setdefault(arch.name, {})[key] = found.tiles
    plan.binaries.setdefault(arch.name, {}).update(found.binaries)
    plan.rejected.extend(found.rejected)


def _kind(layer: KernelLayer, dtype: torch.dtype) -> str:
    """What distinguishes kernels apart from the sizes of the layer."""
    sizes = {"rows", "outputs", "columns", "units", "batch", "heads", "keys", "rank", "rank_out",
             "inner"}  # fmt: skip
    found = layer.problem(1, dtype)
    return str([found.kernel, dtype, *(f for f in found.facts if f[0] not in sizes)])


def check(site: Site, whole: KernelLayer, tiles: TileTable) -> float:
    """The error of a kernel in the interpreter, on some outputs of a layer and random rows.

    ``whole`` is the layer of the site, whose tiles are taken; the error is relative to the largest
    output. Raises LoweringError ``kernel-wrong`` where it is not what the order of additions
    explains.
    """
    layer = site.make(_CHECKED_OUTPUTS)

    def choice(problem: Problem) -> Tile:
        return tiles(whole.problem(problem["rows"], site.dtype))

    layer.bind(run_interpreted, choice, always=True)
    values = site.sample(torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = layer(*values), site.reference(_CHECKED_OUTPUTS, *values)
    if isinstance(found, Tensor):
        return compare(site_of(site.node), found, expected)
    return max(compare(site_of(site.node), a, b) for a, b in zip(found, expected, strict=True))


def compare(site: str, found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value; raises LoweringError if too large."""
    gap = float((found.double() - expected.double()).abs().max())
    error = gap / (float(expected.double().abs().max()) or 1.0)
    # A code may be the next one where a value lies in the middle between two.
    limit = _TOLERANCE.get(expected.dtype)
    if not (gap <= 1 if limit is None else error <= limit):
        raise LoweringError(
            f"a kernel differs from its operator by {error:.1e} of the largest output",
            code="kernel-wrong",
            site=site,
            hint="compile with --backend eager and report the layer's format and sizes",
        )
    return error


def operators_left(
    graph: fx.Graph, sites: Sequence[Site], chip: Chip
) -> tuple[float, list[dict[str, Any]]]:
    """The share of the estimated time that kernels take, and the operators that PyTorch runs.

    Of those how often they are called, their share, and whether Inductor takes them as part of a
    chain; the largest first. Times are what the operations or the bytes of each call take on the
    chip, the longer of both, and its launch.
    """
    owner = graph.owning_module
    assert isinstance(owner, fx.GraphModule)
    taken = {node for site in sites for node in site.nodes}
    times = {node: _seconds(node, chip) for node in graph.nodes if node.op == "call_function"}
    total = sum(times.values()) or 1.0
    chained = chained_calls(owner, taken)
    counts: dict[tuple[str, str], list[float]] = {}
    for node, seconds in times.items():
        if node not in taken:
            by = "inductor" if node in chained else "eager"
            entry = counts.setdefault((str(node.target), by), [0, 0.0])
            entry[0] += 1
            entry[1] += seconds / total
    ordered = sorted(counts.items(), key=lambda item: -item[1][1])
    left = [{"operator": name, "by": by, "calls": int(n), "time": share}
            for (name, by), (n, share) in ordered]  # fmt: skip
    return sum(times[node] for node in taken) / total, left


def _seconds(node: fx.Node, chip: Chip) -> float:
    flops = node_flops(node)
    value = node.meta.get("val")
    if not isinstance(node.target, torch._ops.OpOverload) or value is None:
        return 0.0
    if isinstance(value, int | torch.SymInt):
        return 0.0  # a size, known to the host
    moved = sum(
        value.dtype.itemsize * math.prod(shape_of(value))
        for source in (node, *node.all_input_nodes)
        if isinstance(value := source.meta.get("val"), Tensor)
    )
    if not moved or (not flops and node.target in VIEWS):
        return 0.0
    return max(flops / chip.rate, moved / chip.bandwidth) + chip.launch
