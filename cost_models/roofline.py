"""Time from operations, bytes and launch overhead: what data sheets can say about a device.

    t = ((F / (ec P))^p + (Bw / (em W) + Ba / (em Wa))^p)^(1/p) + launch

with the peak rate P of the number format, the bandwidth W of the memory that weights stream from,
that of the fastest tier the activations fit into (Wa), and efficiencies ec, em, p by kind of work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from mopt.cost import Cost, LayerRequest, ModelCost, Report, Work
from mopt.cost_models.serial import SerialModel
from mopt.device import DeviceProfile, Processor
from mopt.errors import UsageError

# Standard errors of the logarithm for devices that were never measured: matrix work has errors of
# about 25 % once class efficiencies are applied, moving work up to 60 %.
_UNSURE_MATRIX = 0.25
_UNSURE_MOVING = 0.45
_MATRIX = frozenset({"linear", "matmul", "convolution", "attention", "recurrent"})
# What a number format is computed in where the processor lacks it, nearest first.
_INSTEAD = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8", "int16", "int6", "int4", "int3", "int2")
_BLOCKS = re.compile(r"int(\d)-(?:g\d+|channel)(?:-asym)?(-afloat)?")


@dataclass(frozen=True)
class Placement:
    """Which processor of a device suits some work.

    ``crossover`` is the number of operations per byte at which the best other processor would be as
    fast, None where one is faster throughout.
    """

    processor: str
    ops_per_byte: float
    crossover: float | None


class Roofline(SerialModel):
    """The cost model of a device that was not measured."""

    def __init__(self, device: DeviceProfile) -> None:
        self.device = device

    def cost(self, work: Work) -> Cost:
        """The time of one operator on the processor of the device that is fastest at it."""
        if work.kind == "free":
            return Cost(0.0)
        able = [p for p in self.device.processors if _can_run(p, work)]
        if not able:
            raise UsageError(
                f"no processor of {self.device.id} runs {work.kind} on {work.rows} vectors",
                code="no-processor",
            )
        # One that would have to compute in fewer bits than the weights have is second choice.
        exact = [p for p in able if not _loses_bits(p, work.weight_format)]
        return min((self._on(p, work) for p in exact or able), key=lambda cost: cost.milliseconds)

    def placement(self, work: Work) -> Placement:
        """The processor that suits ``work``, and where the choice would turn."""
        chosen = self.cost(work).processor
        others = [
            p for p in self.device.processors if p.name != chosen and _can_run(p, work)
        ]  # fmt: skip
        mine = next(p for p in self.device.processors if p.name == chosen)
        turns = [turn for p in others if (turn := self._crossover(mine, p, work)) is not None]
        nearest = min(turns, key=lambda t: abs(math.log(t / work.ops_per_byte)), default=None)
        return Placement(chosen, work.ops_per_byte, nearest)

    def prepare(self, requests: Sequence[LayerRequest], report: Report | None = None) -> None:
        """Nothing: all that is known is in the profile."""

    def joined(self, costs: Sequence[Cost]) -> Cost:
        """The cost of the operators of one layer."""
        # The runtime of an unmeasured device fuses a layer into one launch.
        launches = sum(self._launch(cost) for cost in costs[1:])
        total = sum(cost.milliseconds for cost in costs) - launches
        energies = [cost.energy_mj for cost in costs]
        return Cost(
            total, costs[0].uncertainty,
            None if None in energies else math.fsum(e for e in energies if e is not None),
            "data-sheet", costs[0].bound, costs[0].processor,
        )  # fmt: skip

    def model_cost(
        self,
        model: str | PathLike[str],
        inputs: Mapping[str, Any] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> ModelCost:
        """See ``mopt.cost.CostModel``."""
        from mopt.cost_models.model_cost import model_cost

        return model_cost(self, model, inputs, sizes)

    # ---- one processor

    def _on(self, processor: Processor, work: Work) -> Cost:
        efficiency = self.device.efficiency[work.kind]
        number_format = arithmetic(processor, work.weight_format)
        rate = processor.peak[number_format].basic * efficiency.compute.basic
        share = efficiency.memory.basic
        compute = work.flops / rate
        moving = (
            work.weight_bytes / (share * self._weight_bandwidth(processor))
            + work.activation_bytes / (share * self._activation_bandwidth(work, processor))
        )  # fmt: skip
        p = efficiency.overlap.basic
        # Scaled by the larger term: a power of nanoseconds would underflow.
        top = max(compute, moving)
        busy = top * ((compute / top) ** p + (moving / top) ** p) ** (1 / p) if top else 0.0
        launch = processor.launch.basic
        terms = {"compute": compute, "memory": moving, "launch": launch}
        seconds = busy + launch
        return Cost(
            1e3 * seconds,
            _UNSURE_MATRIX if work.kind in _MATRIX else _UNSURE_MOVING,
            self._energy(processor, number_format, work, seconds),
            "data-sheet",
            max(terms, key=terms.__getitem__),
            processor.name,
        )

    def _launch(self, cost: Cost) -> float:
        launches = {p.name: 1e3 * p.launch.basic for p in self.device.processors}
        return launches.get(cost.processor, 0.0)

    def _weight_bandwidth(self, processor: Processor) -> float:
        return self.device.tier(processor.memory).bandwidth.basic

    def _activation_bandwidth(self, work: Work, processor: Processor) -> float:
        """Of the fastest tier with room for twice the values; never above a smaller tier's."""
        own = self.device.tier(processor.memory)
        best = math.inf
        for tier in self.device.memory:
            if tier.read_only:
                continue
            best = min(best, max(tier.bandwidth.basic, own.bandwidth.basic))
            if tier is own or 2 * work.activation_bytes <= tier.capacity.basic:
                break
        return best

    def _energy(
        self, processor: Processor, number_format: str, work: Work, seconds: float
    ) -> float | None:
        memory = self.device.tier(processor.memory).energy
        operation = processor.energy.get(number_format)
        if memory is None or operation is None:
            return None
        idle = self.device.power["idle"].basic if "idle" in self.device.power else 0.0
        return 1e3 * (
            work.flops * operation.basic + work.bytes * memory.basic + idle * seconds
        )  # fmt: skip

    def _crossover(self, one: Processor, other: Processor, work: Work) -> float | None:
        """Operations per byte at which two processors need the same time for the bytes of work."""

        def ahead(log_intensity: float) -> float:
            flops = math.exp(log_intensity) * work.bytes
            varied = Work(
                work.kind, flops, work.weight_bytes, work.activation_bytes, work.weight_format
            )
            times = [self._on(p, varied).milliseconds for p in (one, other)]
            return math.log(times[0] / times[1])

        low, high = math.log(1e-3), math.log(1e6)
        if ahead(low) * ahead(high) > 0:
            return None
        for _ in range(60):
            middle = (low + high) / 2
            if ahead(low) * ahead(middle) <= 0:
                high = middle
            else:
                low = middle
        return math.exp((low + high) / 2)


def _loses_bits(processor: Processor, weight_format: str) -> bool:
    wide = weight_format in ("fp32", "fp64")
    return wide and arithmetic(processor, weight_format) not in ("fp64", "fp32")


def arithmetic(processor: Processor, weight_format: str) -> str:
    """The number format in which a processor computes with weights of a format."""
    rule = processor.arithmetic
    half = rule.get("half", weight_format if weight_format in ("fp16", "bf16") else "fp16")
    blocks = _BLOCKS.fullmatch(weight_format)
    if weight_format in ("fp16", "bf16") or (blocks is not None and blocks[2]):
        wanted = half
    elif blocks is not None:
        wanted = rule.get("weight-only", half)
        wanted = f"int{blocks[1]}" if wanted == "own" else wanted
    elif weight_format.startswith(("int8-dynamic", "int8-qdq")):
        wanted = rule.get("dynamic", "int8")
    else:
        wanted = weight_format.split("-")[0]
    for name in (wanted, *_INSTEAD):
        if name in processor.peak:
            return name
    return next(iter(processor.peak))


def _can_run(processor: Processor, work: Work) -> bool:
    if processor.runs and work.kind not in processor.runs:
        return False
    return processor.most_rows is None or work.rows <= processor.most_rows.basic
