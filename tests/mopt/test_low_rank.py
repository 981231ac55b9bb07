"""Decompositions: what a rank loses is known beforehand, and nothing of that rank loses less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mopt.low_rank import Decomposition, allocate, break_even, decompose
from tests.passes.quantize.calibrated import correlated
from tests.tiny import normal


def error(weight: Tensor, found: Decomposition, rank: int, rows: Tensor) -> float:
    """Mean squared error of the outputs per row."""
    first, second = found.factors(rank)
    difference = rows.double() @ (weight.double() - second @ first).t()
    return float(difference.square().sum() / len(rows))


def moment_of(rows: Tensor) -> Tensor:
    return rows.double().t() @ rows.double() / len(rows)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_the_error_of_the_output_is_the_sum_of_the_dropped_squares(
    shape: tuple[int, int], rank: int
) -> None:
    weight, rows = normal(*shape), correlated(500, shape[1])
    found = decompose(weight, moment_of(rows))
    size = error(weight, found, 0, rows)
    assert error(weight, found, rank, rows) == pytest.approx(
        found.loss(rank), rel=1e-6, abs=1e-9 * size
    )
    plain = decompose(weight)
    first, second = plain.factors(rank)
    lost = float((weight.double() - second @ first).square().sum())
    assert lost == pytest.approx(plain.loss(rank), rel=1e-9, abs=1e-9)


def test_no_other_matrix_of_that_rank_loses_less() -> None:
    weight, rows = normal(16, 32), correlated(400, 32)
    moment = moment_of(rows)
    best = decompose(weight, moment)
    for rank in (2, 5, 9):
        others = [decompose(weight), decompose(weight, moment.diagonal().sqrt()),
                  decompose(weight + 0.05 * normal(16, 32, seed=rank), moment)]  # fmt: skip
        least = error(weight, best, rank, rows)
        assert all(error(weight, other, rank, rows) >= least for other in others)
        assert best.loss(rank) >= best.loss(rank + 1)


def test_white_inputs_give_the_plain_decomposition() -> None:
    weight = normal(12, 20)
    for moment in (3.0 * torch.eye(20), 2.0 * torch.ones(20)):
        for left, right in zip(
            decompose(weight, moment).factors(5), decompose(weight).factors(5), strict=True
        ):
            assert left.shape == right.shape
        scaled = decompose(weight, moment)
        first, second = scaled.factors(5)
        plain_first, plain_second = decompose(weight).factors(5)
        assert torch.allclose(second @ first, plain_second @ plain_first)


def test_inputs_that_never_occur_and_fewer_rows_than_inputs() -> None:
    weight, rows = normal(16, 32), correlated(10, 32)
    rows[:, 4] = 0
    found = decompose(weight, moment_of(rows))
    first, second = found.factors(12)
    assert bool(torch.isfinite(first).all()) and bool(torch.isfinite(second).all())
    assert error(weight, found, 12, rows) < 1e-4 * error(weight, found, 0, rows)


def spectra() -> tuple[dict[str, Decomposition], dict[str, tuple[int, int]]]:
    shapes = {"a": (32, 32), "b": (64, 32), "c": (16, 48)}
    found = {}
    for at, (name, shape) in enumerate(shapes.items()):
        decay = torch.linspace(0, 2 * at, shape[1]).exp().neg().exp()
        found[name] = decompose(normal(*shape, seed=at) * decay)
    return found, shapes


def cost(ranks: dict[str, int | None], shapes: dict[str, tuple[int, int]]) -> int:
    return sum(
        shape[0] * shape[1] if ranks[name] is None else ranks[name] * sum(shape)  # type: ignore[operator]
        for name, shape in shapes.items()
    )


def total(ranks: dict[str, int | None], found: dict[str, Decomposition]) -> float:
    return sum(0.0 if r is None else found[name].loss(r) for name, r in ranks.items())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_allocation_keeps_the_budget_and_beats_equal_shares(share: float) -> None:
    found, shapes = spectra()
    budget = int(share * sum(a * b for a, b in shapes.values()))
    even = dict.fromkeys(shapes, 1.0)
    ranks = allocate(found, shapes, budget, weights=even, floor=0.0)
    assert cost(ranks, shapes) <= budget
    uniform = {name: int(share * a * b / (a + b)) for name, (a, b) in shapes.items()}
    assert total(ranks, found) <= total(uniform, found)
    more = allocate(found, shapes, budget + 400, weights=even, floor=0.0)
    assert total(more, found) <= total(ranks, found)


def test_equal_layers_get_equal_ranks_and_all_parameters_keep_all_dense() -> None:
    one = decompose(normal(32, 32))
    found, shapes = {"a": one, "b": one}, {"a": (32, 32), "b": (32, 32)}
    even = {"a": 1.0, "b": 1.0}
    ranks = allocate(found, shapes, 1000, weights=even)
    assert None not in ranks.values() and abs(ranks["a"] - ranks["b"]) <= 1  # type: ignore[operator]
    assert allocate(found, shapes, 2048, weights=even) == {"a": None, "b": None}
    stepped = allocate(found, shapes, 1000, weights=even, step=4)
    assert all(rank is not None and rank % 4 == 0 for rank in stepped.values())


def test_break_even_is_the_last_rank_that_saves() -> None:
    for shape in ((32, 32), (10, 96), (7, 5)):
        rank = break_even(shape)
        assert rank * sum(shape) < shape[0] * shape[1] <= (rank + 1) * sum(shape)
