"""The experts of a layer in a graph: where their weights are, and what each of them reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mopt.program import Program, module_path
from mopt.streaming import Stream

# Rows of the average expert's inputs that every expert's own are mixed with: what an expert is
# rounded for that few tokens or none reach.
_PRIOR_ROWS = 64
_GROUPED = "transformers::grouped_mm_fallback"


@dataclass(frozen=True)
class Experts:
    """A product per expert: ``weight`` reads (E, N, K), ``view`` is its transposition in the call.

    The call's first argument has rows sorted by expert, its third says where those of each end.
    """

    path: str
    call: fx.Node
    view: fx.Node
    weight: fx.Node

    @property
    def rows(self) -> fx.Node:
        """What all experts read, sorted by expert."""
        node = self.call.args[0]
        assert isinstance(node, fx.Node)
        return node

    @property
    def ends(self) -> fx.Node:
        """Where the rows of each expert end."""
        node = self.call.args[2]
        assert isinstance(node, fx.Node)
        return node


def find_experts(program: Program) -> list[Experts]:
    """Grouped products whose weight is stored as (E, N, K) and read nowhere else."""
    found = []
    for node in program.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target._schema.name != _GROUPED:
            continue
        view = node.args[1]
        if view.target is not torch.ops.aten.transpose.int or len(view.users) != 1:
            continue
        weight = view.args[0]
        if program.constant(weight) is None or len(weight.users) != 1:
            continue
        if {axis % 3 for axis in view.args[1:]} != {1, 2}:
            continue
        name = str(weight.target).rpartition(".")[2]
        path = f"{module_path(node)}.{name}" if module_path(node) else str(weight.target)
        full = f"{program.path}.{path}" if program.path else path
        found.append(Experts(full, node, view, weight))
    return found


class ExpertInputs:
    """What reaches each expert of a call, on calibration data."""

    def __init__(self, experts: Experts, stream: Stream) -> None:
        self._rows = stream.values(experts.rows)
        self._ends = [ends.tolist() for ends in stream.values(experts.ends)]
        first = self._rows[0]
        total = torch.zeros(first.shape[1], first.shape[1])
        for rows in self._rows:
            total.addmm_(rows.float().t(), rows.float())
        self._mean = total / max(sum(len(rows) for rows in self._rows), 1)

    @property
    def counts(self) -> list[int]:
        """Rows per expert."""
        return [len(self._of(expert)) for expert in range(len(self._ends[0]))]

    def moment(self, expert: int) -> Tensor:
        """The mean of x x^T over an expert's rows, with some of the average expert's mixed in."""
        own = self._of(expert)
        return (own.t() @ own + _PRIOR_ROWS * self._mean) / (len(own) + _PRIOR_ROWS)

    def _of(self, expert: int) -> Tensor:
        parts = []
        for rows, ends in zip(self._rows, self._ends, strict=True):
            start = ends[expert - 1] if expert else 0
            parts.append(rows[int(start) : int(ends[expert])].float())
        return torch.cat(parts)
