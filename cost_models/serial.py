"""What models whose operators run one after another share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mopt.cost import Cost, Work, combine


class SerialModel:
    """A layer costs what its operators cost in a row; each costs what :meth:`cost` says."""

    @abstractmethod
    def cost(self, work: Work) -> Cost:
        """See ``mopt.cost.CostModel``."""

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
        """See ``mopt.cost.CostModel``."""
        from mopt.cost_models.layer_work import layer_works

        works = layer_works(
            kind, shape, weight_format, rows=rows, geometry=geometry, sharers=sharers,
            isolated=isolated,
        )  # fmt: skip
        return self.joined([self.cost(work) for work in works])

    def joined(self, costs: Sequence[Cost]) -> Cost:
        """The cost of operators in a row."""
        return replace(combine(costs), bound=costs[0].bound, processor=costs[0].processor)
