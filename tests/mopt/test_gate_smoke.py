"""Models made shallower for a smoke check."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mopt.gate_smoke import shrunk
from mopt.model_source import ModelSource


class Deep(nn.Module):
    def __init__(self, needed: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        self.needed = needed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.blocks[self.needed](x))


def source(model: nn.Module) -> ModelSource:
    return ModelSource(name="deep", model=model, example_inputs=(torch.zeros(1, 4),))


def test_repeated_blocks_are_left_out_of_a_copy() -> None:
    given = source(Deep())
    found, note = shrunk(given)
    assert note == "4 repeated blocks left out"
    assert [len(m.blocks) for m in (found.model, given.model)] == [2, 6]  # type: ignore[arg-type]
    assert len(found.model.head) == 3  # type: ignore[arg-type]


def test_a_model_that_needs_its_depth_stays_whole() -> None:
    given = source(Deep(needed=5))
    found, note = shrunk(given)
    assert found is given and "does not run" in note


def test_a_model_without_repeated_blocks_stays_whole() -> None:
    given = source(nn.Linear(4, 4))
    assert shrunk(given) == (given, "whole: no repeated blocks")
