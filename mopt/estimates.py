"""What the cost model of the target says of lowered models, beside what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mopt.cost import CostModel, ModelCost
from mopt.device import DeviceProfile
from mopt.errors import MoptError
from mopt.layer_speed import slower_layers
from mopt.lowering import Artifact
from mopt.proof import example_arrays

# The one lowered form whose operators are known one by one.
_BACKEND, _MODEL = "onnx", "model.onnx"


@dataclass(frozen=True)
class Estimator:
    """Estimates of one compile: for which device, by which model."""

    device: DeviceProfile
    model: CostModel

    def cost(self, artifact: Artifact) -> ModelCost | None:
        """What a run on the example inputs costs; None for parts of models and other backends."""
        manifest = artifact.manifest
        if manifest["backend"] != _BACKEND or manifest["kind"] != "whole":
            return None
        try:
            return self.model.model_cost(artifact.folder / _MODEL, example_arrays(artifact))
        except MoptError:
            # A device without a processor for some operator has no estimate, not a failed compile.
            return None

    def slower_layers(
        self, before: tuple[Artifact, ModelCost | None], after: tuple[Artifact, ModelCost | None],
        threads: int | None,
    ) -> dict[str, tuple[float, float]]:  # fmt: skip
        """Layers that take clearly longer than they did, timed; see ``mopt.layer_speed``."""
        (old, was), (new, now) = before, after
        if was is None or now is None or not self.device.is_host:
            return {}
        sides = (old.folder / _MODEL, was), (new.folder / _MODEL, now)
        return slower_layers(*sides, example_arrays(new), threads)


def add_estimates(
    data: dict[str, Any], device: DeviceProfile, before: ModelCost | None, after: ModelCost | None,
    planned_bytes: int, choice: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    """Put the estimates into a report's data: times, energies, sizes, and how far they were off.

    ``planned_bytes`` are the bytes of the compressed program before it was lowered.
    """
    found = {"baseline": before, "result": after}
    size = choice["estimated"]["size"] if choice else planned_bytes
    data["estimates"] = {
        "device": device.id,
        "is_this_machine": device.is_host,
        "size_bytes": size,
        **{side: _summary(cost) for side, cost in found.items()},
    }
    for side, cost in found.items():
        if cost is not None:
            data[side]["latency_ms"]["estimated"] = cost.milliseconds
    errors = {"size": size / data["result"]["size_bytes"] - 1}
    latency = data["result"]["latency_ms"]
    if latency["estimated"] is not None and latency["measured"]:
        errors["latency"] = latency["estimated"] / latency["measured"] - 1
    data["estimate_error"] = {**errors, **data.get("estimate_error", {})}
    if choice is not None:
        for row in data["layers"]:
            row.update(choice["layers"].get(row["path"], {}))


def _summary(cost: ModelCost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    whole = cost.cost
    return {
        "latency_ms": whole.milliseconds,
        "low_ms": whole.low,
        "high_ms": whole.high,
        "level": whole.level,
        "energy_mj": whole.energy_mj,
        "unknown": list(cost.unknown),
    }
