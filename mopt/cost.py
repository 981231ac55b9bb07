"""Work, what it costs on a device, and who can tell.

device = find_device("host")
model = cost_model(device)
model.layer_cost("linear", (3072, 768), "int8-dynamic", rows=128).milliseconds
model.model_cost("out/model/model.onnx").milliseconds
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from mopt.cache import Cache
    from mopt.device import DeviceProfile

# Where an estimate comes from, from the most to the least certain: timed as it is; from a model
# fitted to this machine; the same for an operator that was never timed there; from data sheets.
Level = Literal["measured", "calibrated", "transferred", "data-sheet"]
Report = Callable[[int, int], None]
LEVELS: tuple[Level, ...] = ("measured", "calibrated", "transferred", "data-sheet")
# Half width of a 90 % band in standard errors of the logarithm.
_BAND = 1.645


@dataclass(frozen=True)
class Work:
    """One operator on a device: what it computes and moves.

    ``kind`` groups operators that share kernels and decides what ``shape`` holds:

    - ``linear``: (rows, outputs, inputs) of a product with a stored weight
    - ``matmul``: (batches, rows, columns, inner) of a product of two activations
    - ``convolution``: (batch, inputs, outputs, groups, *output sizes, *kernel sizes)
    - ``attention``: (batch, heads, queries, keys, width)
    - ``embedding``: (rows looked up, width)
    - ``recurrent``: (steps, batch, inputs, hidden, directions)
    - ``norm``, ``softmax``, ``pointwise``, ``pool``, ``reduce``, ``quantize``, ``move``,
      ``other``: (elements written,)
    - ``free``: nothing is computed or moved

    ``operator`` is the runtime's own name where it is known. ``weight_format`` is a name of
    ``mopt.formats`` (``fp32`` when plain). ``weight_bytes`` and ``activation_bytes`` are read or
    written once, in the formats they are stored in. ``variant`` tells kernels of one kind apart.
    """

    kind: str
    flops: float
    weight_bytes: float
    activation_bytes: float
    weight_format: str = "fp32"
    path: str = ""
    rows: int = 1
    shape: tuple[int, ...] = ()
    operator: str = ""
    variant: str = ""

    @property
    def bytes(self) -> float:
        """Everything read and written."""
        return self.weight_bytes + self.activation_bytes

    @property
    def ops_per_byte(self) -> float:
        """Arithmetic intensity; infinite for work that moves nothing."""
        return self.flops / self.bytes if self.bytes else math.inf


@dataclass(frozen=True)
class Cost:
    """Estimated time, and how sure it is.

    ``uncertainty`` is the standard error of the logarithm of the time: 0.1 is about 10 %.
    ``bound`` says what the time goes to: compute, memory or launch. ``energy_mj`` is None where
    the device's profile has no energies.
    """

    milliseconds: float
    uncertainty: float = 0.0
    energy_mj: float | None = None
    level: Level = "data-sheet"
    bound: str = ""
    processor: str = ""

    @property
    def low(self) -> float:
        """Lower end of the 90 % band, in milliseconds."""
        return self.milliseconds * math.exp(-_BAND * self.uncertainty)

    @property
    def high(self) -> float:
        """Upper end of the 90 % band, in milliseconds."""
        return self.milliseconds * math.exp(_BAND * self.uncertainty)


@dataclass(frozen=True)
class NodeCost:
    """One operator that the runtime executes: its name there, its work and cost."""

    name: str
    work: Work
    cost: Cost


@dataclass(frozen=True)
class ModelCost:
    """What one run of a model costs: the operators the runtime really executes, and overheads.

    ``overhead_ms`` is the time of a run that belongs to no operator. ``peak_bytes`` is the private
    memory that loading and running the model takes (as ``mopt.measure`` counts it), None if the
    model is for another runtime. ``unknown`` names operators that were estimated by bytes alone.
    """

    cost: Cost
    nodes: tuple[NodeCost, ...]
    overhead_ms: float = 0.0
    peak_bytes: int | None = None
    unknown: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def milliseconds(self) -> float:
        """Time of one run."""
        return self.cost.milliseconds

    def as_json(self) -> dict[str, Any]:
        """Plain data for a report; the dearest operators first."""
        return {
            "milliseconds": self.cost.milliseconds,
            "low": self.cost.low,
            "high": self.cost.high,
            "level": self.cost.level,
            "energy_mj": self.cost.energy_mj,
            "overhead_ms": self.overhead_ms,
            "peak_bytes": self.peak_bytes,
            "unknown": list(self.unknown),
            "nodes": [
                {
                    "name": node.name,
                    "operator": node.work.operator,
                    "path": node.work.path,
                    "milliseconds": node.cost.milliseconds,
                    "bound": node.cost.bound,
                    "level": node.cost.level,
                }
                for node in sorted(self.nodes, key=lambda n: -n.cost.milliseconds)
            ],
        }


@dataclass(frozen=True)
class LayerRequest:
    """The arguments of ``CostModel.layer_cost``, to be announced before it is called."""

    kind: str
    shape: tuple[int, ...]
    weight_format: str = "fp32"
    rows: int = 1
    geometry: Mapping[str, Any] | None = None
    sharers: int = 1


class CostModel(Protocol):
    """Estimates for one device."""

    device: DeviceProfile

    def prepare(self, requests: Sequence[LayerRequest], report: Report | None = None) -> None:
        """Announce layers and formats whose costs will be asked for.

        A model of this machine may time them now, all in one go; others do nothing.
        ``report(done, total)`` is called on the way.
        """
        ...

    def cost(self, work: Work) -> Cost:
        """What one operator costs."""
        ...

    def layer_cost(
        self,
        kind: str,
        shape: Sequence[int],
        weight_format: str = "fp32",
        *,
        rows: int = 1,
        geometry: Mapping[str, Any] | None = None,
        sharers: int = 1,
        isolated: bool = True,
    ) -> Cost:
        """What a layer costs in a format, with the work that the format brings.

        ``kind`` and ``shape`` are those of ``mopt.layers.Layer`` (the weight's shape); ``rows`` is
        the number of vectors the layer is applied to in one run. ``geometry`` describes a
        convolution: ``batch``, ``output`` (sizes of the output), ``stride``, ``groups``,
        ``transposed``; of a linear layer ``bias``, whether it has one (True unless given). A group
        of ``sharers`` layers that read the same activations (q, k, v; gate,
        up) shares the rounding of them; the cost is that of one of them. ``isolated`` counts the
        conversions of a statically quantized layer among float ones; without it its neighbours
        compute in 8 bits too. Raises UsageError ``no-kernel`` for a format that the device cannot
        compute with.
        """
        ...

    def model_cost(
        self,
        model: str | PathLike[str],
        inputs: Mapping[str, Any] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> ModelCost:
        """What one run of a lowered model costs, after all fusions of the runtime.

        ``model`` is the path of an ONNX file, ``inputs`` arrays by name. Without them zeros are
        taken, with ``sizes`` for its named dimensions. The model is loaded and run once to see
        what is executed; nothing is timed.
        """
        ...


def cost_model(
    device: DeviceProfile, *, timed: bool = False, cache: Cache | None = None,
    threads: int | None = None,
) -> CostModel:  # fmt: skip
    """The best model there is for a device: fitted to measurements if it has any, else roofline.

    ``timed`` times the operators it is asked about on this machine, if that is the device: with so
    many ``threads``, keeping what it finds in ``cache``.
    """
    # Found by name, as backends are: the core imports no cost model.
    select = import_module("mopt.cost_models.select")
    made: CostModel = select.cost_model(device, timed=timed, cache=cache, threads=threads)
    return made


def combine(costs: Sequence[Cost], *, correlation: float = 0.5) -> Cost:
    """The cost of doing one thing after another.

    Errors of a model's operators stem partly from the same causes: ``correlation`` is how much two
    of them have in common.
    """
    total = sum(cost.milliseconds for cost in costs)
    if not total:
        return Cost(0.0, level="measured")
    shares = [cost.milliseconds * cost.uncertainty / total for cost in costs]
    variance = correlation * sum(shares) ** 2 + (1 - correlation) * sum(s * s for s in shares)
    energies = [cost.energy_mj for cost in costs]
    return Cost(
        total,
        math.sqrt(variance),
        None if None in energies else math.fsum(e for e in energies if e is not None),
        _level(costs, total),
    )


def _level(costs: Sequence[Cost], total: float) -> Level:
    """The least certain level that more than a tenth of the time rests on."""
    share = dict.fromkeys(LEVELS, 0.0)
    for cost in costs:
        share[cost.level] += cost.milliseconds / total
    below = 0.0
    for level in reversed(LEVELS):
        below += share[level]
        if below > 0.1:
            return level
    return LEVELS[0]
