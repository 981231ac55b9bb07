"""Twin-log levels: evenly spaced logarithms with two different sides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mopt.formats import find_format
from mopt.formats.level_blocks import LevelBlocks
from mopt.levels import levels
from tests.tiny import normal


def heavy(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Student's t with four degrees of freedom."""
    parts = [normal(rows, columns, seed=100 * seed + at).square() for at in range(4)]
    return normal(rows, columns, seed=seed + 77) / (torch.stack(parts).sum(0) / 4).sqrt()


def error(name: str, weight: Tensor) -> float:
    form = find_format(name)
    found = form.decode(form.encode(weight))
    return float((found - weight).square().sum() / weight.square().sum())


def test_it_wins_on_heavy_tails_and_loses_on_normal_weights() -> None:
    assert error("twinlog4", heavy(64, 256)) < 0.8 * error("int4-g128", heavy(64, 256))
    assert error("twinlog4", normal(64, 256)) > 1.2 * error("nf4-g128", normal(64, 256))
    assert error("twinlog4", normal(64, 256)) == pytest.approx(0.0123, rel=0.1)


def test_levels_are_even_in_the_logarithm_and_have_no_zero() -> None:
    for table in levels("twinlog4").tables:
        assert len(table.unique()) == 16
        steps = table[:8].log2().diff()
        assert torch.allclose(steps, steps[:1].expand(7), atol=1e-5)
        assert torch.allclose(table[8:] / table[:8], (table[8] / table[0]).expand(8))


@pytest.mark.parametrize("ranges", ["mse", "min-max"])
def test_bytes_are_exact_and_zeros_stay_next_to_zero(ranges: str) -> None:
    form = find_format("twinlog4")
    assert isinstance(form, LevelBlocks)
    weight = normal(6, 200)
    weight[2] = 0
    encoded = form.encode(weight, grid=form.grid(weight, ranges=ranges))
    found = form.decode(encoded)
    assert encoded.size_bytes == form.size_bytes((6, 200))
    assert bool(found.isfinite().all())
    assert float(found[2].abs().max()) < 1e-25
    again = form.encode(found, grid=form.grid(weight, ranges=ranges))
    assert torch.equal(form.decode(again), found)


def test_a_group_picks_the_best_table_and_side() -> None:
    form = find_format("twinlog4")
    assert isinstance(form, LevelBlocks)
    weight = heavy(32, 128)
    weight = torch.where(weight < 0, 0.75 * weight, weight)  # one side reaches further
    grid = form.grid(weight)
    assert grid.tables is not None and len(grid.tables.unique()) > 1
    # Mirrored weights are as good: a negative scale swaps the sides.
    assert error("twinlog4", -weight) == pytest.approx(error("twinlog4", weight), rel=0.02)
    assert bool((form.grid(-weight).scales < 0).any())
