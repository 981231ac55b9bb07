"""Cost models for tests of pruning: tables whose answers can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from mopt.cost import Cost, LayerRequest, Work


class BlockModel:
    """A device that computes whole blocks of ``block`` channels, a million products per ms."""

    def __init__(self, block: int = 8) -> None:
        self.block = block
        self.device = SimpleNamespace(id="blocks")

    def prepare(self, requests: Sequence[LayerRequest], report: Any = None) -> None:
        pass

    def layer_cost(
        self, kind: str, shape: Sequence[int], weight_format: str = "fp32", *, rows: int = 1,
        geometry: Mapping[str, Any] | None = None, sharers: int = 1, isolated: bool = True,
    ) -> Cost:  # fmt: skip
        outputs, inputs = (-(-size // self.block) * self.block for size in shape[:2])
        return Cost(outputs * inputs * math.prod(shape[2:]) * rows / 1e6)

    def cost(self, work: Work) -> Cost:
        """Recurrent layers, the only ones that are asked about as work."""
        steps, batch, inputs, hidden, directions = work.shape
        units = -(-hidden // self.block) * self.block
        return Cost(4 * units * (inputs + units) * directions * steps * batch / 1e6)
