"""Models made small for a smoke check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from mopt.frontend import capture
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


class Words(nn.Module):
    """A tied language model: ids and a mask to scores; positions are a table of their own."""

    def __init__(self, rows: int = 5000, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(rows, 8, padding_idx=rows - 1)
        self.positions = nn.Embedding(64, 8)
        self.head = nn.Linear(8, rows, bias=not tied)
        if tied:
            self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(x * mask[:, :, None])


class Stages(nn.Module):
    """Two stages of three equal blocks, each behind one that doubles the channels."""

    def __init__(self, outputs: int | None = None) -> None:
        super().__init__()
        channels = [(3, 8), (8, 8), (8, 8), (8, 8), (8, 16), (16, 16), (16, 16), (16, 16)]
        self.blocks = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in channels))
        self.head = nn.Linear(16 if outputs is None else outputs, 2)
        self.is_flat = outputs is not None

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(images)
        return self.head(x.flatten(1) if self.is_flat else x.mean((2, 3)))


def source(model: nn.Module, *inputs: Tensor, **more: Any) -> ModelSource:
    given = inputs or (torch.zeros(1, 4),)
    return ModelSource(name="deep", model=model.eval(), example_inputs=given, **more)


def shapes_of(inputs: Any) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in inputs]


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


@pytest.mark.parametrize("tied", [True, False])
def test_words_and_lengths_that_may_vary_are_cut(tied: bool) -> None:
    ids = torch.arange(4936, 5000).repeat(2, 1)
    dims = {0: Dim("batch", min=1, max=8), 1: Dim("length", min=2, max=64)}
    data = [(ids + index - 5, torch.ones(2, 64)) for index in range(5)]
    given = source(
        Words(tied=tied), ids, torch.ones(2, 64), calibration=data,
        dynamic_shapes={"ids": dims, "mask": dims},
    )  # fmt: skip
    found, note = shrunk(given)
    assert note == "inputs cut to 2x16, 2x16, 5,000 words cut to 1,024"
    assert shapes_of(found.example_inputs) == [(2, 16), (2, 16)]
    assert int(found.example_inputs[0].max()) < 1024
    assert found.model.tokens.weight.shape == (1024, 8)
    assert (found.model.tokens.weight is found.model.head.weight) == tied
    assert found.model(*found.example_inputs).shape == (2, 16, 1024)
    assert given.model.tokens.num_embeddings == 5000 == given.model.head.out_features
    assert found.calibration is not None
    assert [shapes_of(batch) for batch in found.calibration] == 2 * [[(2, 16), (2, 16)]]
    capture(found.model, found.example_inputs, found.dynamic_shapes)


def test_derived_sizes_stay_what_they_are_made_of() -> None:
    side = Dim("side", min=1, max=64)
    shapes = ({2: 8 * side, 3: 8 * side},)
    found, note = shrunk(source(Stages(), torch.zeros(2, 3, 72, 72), dynamic_shapes=shapes))
    assert shapes_of(found.example_inputs) == [(2, 3, 32, 32)]
    assert note == "inputs cut to 2x3x32x32, 2 repeated blocks left out"


def test_two_of_each_run_of_equal_blocks_stay() -> None:
    found, note = shrunk(source(Stages(), torch.zeros(1, 3, 128, 128)))
    assert note == "inputs cut to 1x3x64x64, 2 repeated blocks left out"
    assert [conv.weight.shape[0] for conv in found.model.blocks] == [8] * 3 + [16] * 3


def test_what_fits_one_size_only_keeps_that_size() -> None:
    found, note = shrunk(source(Stages(16 * 128 * 128), torch.zeros(1, 3, 128, 128)))
    assert note == "2 repeated blocks left out"
    assert shapes_of(found.example_inputs) == [(1, 3, 128, 128)]
