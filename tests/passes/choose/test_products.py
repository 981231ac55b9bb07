"""Multiplications in front of int8 layers are options where a loss is in the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mopt.calibration import Calibration
from mopt.pass_base import PassContext
from mopt.passes.choose._options import Sites, fill_options, read_sites
from mopt.passes.choose._products import adopt, find_products, with_products
from mopt.program import Program
from tests import tiny
from tests.passes.choose.test_choose_formats import TableModel, run


class _Gelu(nn.Module):
    """A block whose activation has two channels that are far larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def _program() -> tuple[Program, Calibration]:
    sample = tiny.sample(_Gelu(), tiny.normal(32, 64))
    with torch.no_grad():
        sample.module.up.weight[:2] *= 60
        sample.module.down.weight[:, :2] /= 60
    program = sample.capture()
    return program, Calibration([(tiny.normal(32, 64, seed=s),) for s in range(4)], program)


def _read(program: Program) -> list[Sites]:
    return read_sites(program, lambda path: True, 0)[0]


def _products_of(program: Program) -> int:
    return sum(node.target == torch.ops.aten.mul.Tensor for node in program.nodes)


def _options(program: Program) -> list[Sites]:
    sites = _read(program)
    fill_options(program, sites, {"linear": ["int8-dynamic"]}, TableModel(), allow_slower=False)
    return sites


def test_they_are_taken_where_the_time_allows() -> None:
    program, calibration = _program()
    limit, form = "latency<=0.68x", {"formats": "int8-dynamic"}
    scaled = run(program, limit, "minimize=loss", options=form, calibration=calibration)
    choice = scaled.plan["choice"]
    assert choice["products"] == ["down"]
    assert choice["layers"]["down"]["option"] == "int8-dynamic scaled"
    assert scaled.plan["formats"]["down"] == "int8-dynamic"
    assert _products_of(scaled) == 1
    assert choice["estimated"]["raw_latency"] <= 0.68 * choice["baseline"]["latency"]
    plain = run(
        program, limit, "minimize=loss", options=form | {"products": False},
        calibration=calibration,
    )  # fmt: skip
    assert plain.plan["choice"]["products"] == []

    def error(result: Program) -> float:
        total = 0.0
        for args, kwargs in calibration.for_part(program):
            total += float((result.run(*args, **kwargs) - program.run(*args, **kwargs)).norm())
        return total

    assert error(scaled) < 0.5 * error(plain)


@pytest.mark.parametrize("texts", [
    ("latency<=0.41x", "minimize=loss"),  # int8 alone takes 0.40x, the product 0.25x of a layer
    ("minimize=latency", "quality>=0.5"),  # no loss is in the way
])  # fmt: skip
def test_they_are_not_taken_where_time_counts_more(texts: tuple[str, ...]) -> None:
    program, calibration = _program()
    options = {"formats": "int8-dynamic", "widths": False}
    result = run(program, *texts, options=options, calibration=calibration)
    assert set(result.plan["formats"]) == {"up", "down"}
    assert result.plan["choice"]["products"] == []
    assert _products_of(result) == 0


def test_factors_of_other_layers_go_back_into_the_weights() -> None:
    program, calibration = _program()
    ctx = PassContext(calibration=calibration)
    for kept, count in ((set(), 0), ({"down"}, 1)):
        scaled = with_products(program, ctx, _options(program), _read)
        assert scaled is not None
        target = program.copy()
        adopt(target, scaled, kept)
        target.verify()
        assert len(list(find_products(target))) == count
        x = tiny.normal(32, 64, seed=9)
        assert torch.allclose(target.run(x), program.run(x), rtol=1e-5, atol=1e-5)
    # The program itself was not touched.
    assert list(find_products(program)) == []


def test_multiplications_of_the_user_stay() -> None:
    program, calibration = _program()
    ctx = PassContext(calibration=calibration)
    own = with_products(program, ctx, _options(program), _read)
    assert own is not None
    again = with_products(own.program, ctx, _options(own.program), _read)
    if again is not None:
        adopt(own.program, again, set())
    assert len(list(find_products(own.program))) == 1
