"""choose-formats, with a cost model that is a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import mopt
from mopt.budget import Budget
from mopt.cache import Cache
from mopt.calibration import Calibration
from mopt.choice import Baseline, Observation
from mopt.cost import Cost, LayerRequest, Work
from mopt.errors import PassError, UsageError
from mopt.pass_base import PassContext
from mopt.passes.choose._limits import Corrections, Limits, make_problem
from mopt.passes.choose._place import place
from mopt.passes.choose._sensitivity import Losses, enough_batches, gives_logits
from mopt.pipeline import Pipeline
from mopt.program import ModelSize, Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case

# ms per million weights; convolutions cost as much as linears.
SPEEDS = {"fp32": 1.0, "int8-dynamic": 0.4, "int8-g128": 0.6, "int4-g32": 0.5, "int4-g128": 0.5,
          "int8-row": 0.2, "int8-qdq": 0.3}  # fmt: skip


class TableModel:
    """A cost model whose times are proportional to the number of weights."""

    def __init__(
        self, border: float = 0.0, millijoules: float | None = None, **speeds: float
    ) -> None:
        self.border = border
        # What a millisecond takes.
        self.millijoules = millijoules
        self.speeds = SPEEDS | {name.replace("_", "-"): v for name, v in speeds.items()}
        self.device = SimpleNamespace(id="table")

    def prepare(self, requests: Sequence[LayerRequest], report: Any = None) -> None:
        pass

    def cost(self, work: Work) -> Cost:
        return Cost(work.activation_bytes / 8e6)

    def layer_cost(
        self, kind: str, shape: Sequence[int], weight_format: str = "fp32", *, rows: int = 1,
        geometry: Mapping[str, Any] | None = None, sharers: int = 1, isolated: bool = True,
    ) -> Cost:  # fmt: skip
        name = weight_format.removesuffix("-reduced")
        if name not in self.speeds:
            raise UsageError(f"no kernel for {name}", code="no-kernel")
        border = self.border if isolated and name == "int8-qdq" else 0.0
        taken = (self.speeds[name] + border) * math.prod(shape) / 1e6
        return Cost(taken, energy_mj=self.millijoules and self.millijoules * taken)


def budget(*texts: str, **more: Any) -> dict[str, Any]:
    return {"budget": Budget.parse(texts), "cost_model": TableModel(), **more}


SMALL = {"min_size": 0}
# Outputs of layers rounded to 8 bits are within a few hundredths; 4 bits cost about a tenth.
CASES = [
    Case("fastest", tiny.mlp(64, 64), True, SMALL, tolerance=0.05,
         context=budget("minimize=latency", "quality>=0.999")),
    Case("smallest", tiny.mlp(64, 64), True, SMALL, tolerance=0.4,
         context=budget("minimize=size", "quality>=0.9")),
    Case("half-size", tiny.mlp(64, 64), True, SMALL, tolerance=0.01,
         context=budget("size<=0.52x", "minimize=loss")),
    Case("decoder", tiny.decoder, True, SMALL, tolerance=0.1,
         context=budget("latency<=0.7x")),
    Case("nothing-to-gain", tiny.mlp(64, 64), False, SMALL, context=budget("minimize=loss"),
         skipped="the choice under the budget keeps it as it is"),
    Case("all-slower", tiny.mlp(64, 64), False, SMALL,
         context=budget("minimize=latency", "quality>=0.99",
                        cost_model=TableModel(**dict.fromkeys(
                            ("int8_dynamic", "int8_g128", "int4_g32", "int4_g128"), 2.0)))),
    Case("small-layers-stay", tiny.mlp(), False, context=budget("size<=0.5x"),
         skipped="fewer than min_size 4096"),
    Case("excluded-by-name", tiny.mlp(64, 64), False, SMALL | {"skip": "*"},
         context=budget("minimize=size", "quality>=0.5"), skipped="layers and skip leave it out"),
]  # fmt: skip


def run(
    program: Program, *texts: str, options: dict[str, Any] | None = None, **context: Any
) -> Program:
    ctx = PassContext(**budget(*texts, **context))
    return Pipeline([make_pass("choose-formats", SMALL | (options or {}))]).run(program, ctx)


def decoder() -> Program:
    return tiny.decoder().capture()


def test_layers_that_read_one_value_agree() -> None:
    result = run(decoder(), "minimize=size", "quality>=0.995")
    layers = result.plan["choice"]["layers"]
    groups = [set(row["group"]) for row in layers.values()]
    assert any(len(group) == 3 for group in groups)  # q, k, v
    for row in layers.values():
        assert len({layers[path]["option"] for path in row["group"]}) == 1


def test_a_slower_format_is_refused_with_its_times_unless_allowed() -> None:
    program = tiny.mlp(64, 64).capture()
    model = TableModel(int8_dynamic=1.5, int4_g32=1.5, int4_g128=1.5, int8_g128=1.5)
    strict = run(program, "size<=0.6x", cost_model=model)
    refused = [row for layer in strict.plan["choice"]["layers"].values()
               for row in layer["candidates"] if "reason" in row]  # fmt: skip
    assert any("estimated slower: 0.0061" in row["reason"] for row in refused)
    assert set(strict.plan["formats"].values()) == {"fp16"}
    loose = run(
        program, "size<=0.4x", cost_model=TableModel(int8_g32=1.5), allow_slower=True,
        options={"formats": "int8-g32"},
    )  # fmt: skip
    assert set(loose.plan["formats"].values()) == {"int8-g32"}


def test_who_only_limits_bytes_gets_the_fastest_of_what_loses_as_little() -> None:
    """Halves of floats lose next to nothing, and nothing runs faster for them."""
    program = tiny.mlp(64, 64).capture()
    least, found = (
        run(program, "size<=0.55x", *more, options={"formats": "fp16,int8-dynamic"})
        for more in (["minimize=loss"], [])
    )
    assert set(least.plan["formats"].values()) == {"fp16"}
    assert set(found.plan["formats"].values()) == {"int8-dynamic"}
    before, after = (one.plan["choice"]["estimated"] for one in (least, found))
    assert after["latency"] < before["latency"]
    assert before["loss"] < after["loss"] <= before["loss"] + 1e-3


def test_the_plan_explains_every_layer() -> None:
    plan = run(decoder(), "size<=0.4x").plan["choice"]
    assert plan["status"] == "optimal"
    assert plan["binding"] == ["size"]
    assert plan["prices"]["size"] > 0
    assert plan["estimated"]["size"] <= plan["limits"]["size"]
    row = next(row for row in plan["layers"].values() if row["option"] != "original")
    assert {"format", "size_bytes", "latency_ms", "loss"} <= set(row["candidates"][0])
    assert row["runner_up"] != row["option"]
    assert row["runner_up"] in row["why"]


def test_a_budget_that_cannot_be_met_gives_the_nearest_point() -> None:
    plan = run(tiny.mlp(64, 64).capture(), "size<=0.01x", "quality>=0.99").plan["choice"]
    assert plan["status"] == "infeasible"
    assert "size" in plan["excess"]
    assert plan["least"]["size"] > plan["limits"]["size"]


def test_what_was_measured_corrects_the_next_choice() -> None:
    program = tiny.mlp(64, 64).capture()
    first = run(program, "size<=0.3x")
    seen = first.plan["choice"]["estimated"]
    before = Baseline(program.size_bytes())
    heavier = Observation(first.plan["formats"], seen, {"size": seen["size"] + 2000})
    second = run(program, "size<=0.3x", observations=(heavier,), baseline=before)
    assert second.plan["choice"]["round"] == 2
    assert second.plan["choice"]["estimated"]["size"] <= 0.3 * before.size_bytes + 1
    assert second.size_bytes() + 2000 <= 0.3 * before.size_bytes < first.size_bytes() + 2000
    worse = Observation(first.plan["formats"], seen, {"loss": 50 * seen["raw_loss"]})
    third = run(program, "minimize=size", f"quality>={1 - 4 * seen['raw_loss']}",
                observations=(worse,))  # fmt: skip
    assert third.plan["choice"]["corrections"]["loss"] == pytest.approx(50)
    assert third.size_bytes() > first.size_bytes()


def test_formats_that_lost_time_when_measured_are_dropped() -> None:
    program = tiny.mlp(64, 64).capture()
    first = run(program, "minimize=latency", "quality>=0.9")
    assert set(first.plan["formats"].values()) == {"int8-dynamic"}
    seen = Observation(
        first.plan["formats"], first.plan["choice"]["estimated"], {"latency": 1.3},
        {"latency": 1.0}, is_slower=True,
    )  # fmt: skip
    second = run(program, "minimize=latency", "quality>=0.9", observations=(seen,))
    assert "int8-dynamic" not in second.plan["formats"].values()
    row = next(iter(second.plan["choice"]["layers"].values()))
    assert any(
        "measured slower in the whole model" in c.get("reason", "") for c in row["candidates"]
    )


def test_a_format_is_not_blamed_for_the_slow_layers_of_another() -> None:
    guess = {"raw_latency": 0.5, "whole_latency": 1.0}
    formats = {"a": "int8-qdq", "b": "int8-qdq", "c": "int8-dynamic"}
    seen = Observation(formats, guess, {"latency": 2.0}, {"latency": 1.0}, is_slower=True)
    blamed = replace(seen, slower_layers=frozenset("ab"))
    budget = Budget.parse(["latency<=0.5x"])
    learn = Corrections.learn
    assert set(learn([seen], Baseline(100, 1.0), budget).savings) == {"int8-qdq", "int8-dynamic"}
    assert set(learn([blamed], Baseline(100, 1.0), budget).savings) == {"int8-qdq"}
    # Time was saved, if less than hoped: the estimate as a whole is off.
    less = replace(blamed, measured={"latency": 0.8}, is_slower=False)
    found = learn([less], Baseline(100, 1.0), budget).savings
    assert found == {"int8-qdq": pytest.approx(0.4), "int8-dynamic": pytest.approx(0.4)}


def test_another_budget_measures_nothing_twice(tmp_path: Path) -> None:
    program, cache = decoder(), Cache(tmp_path)
    first = run(program, "size<=0.5x", cache=cache).plan["choice"]["sensitivity"]
    again = run(program, "size<=0.4x", cache=Cache(tmp_path)).plan["choice"]["sensitivity"]
    assert first["exact"] > 0
    assert first["cached"] == 0
    assert again["exact"] == 0
    assert again["cached"] == first["exact"]
    other = tiny.decoder()
    with torch.no_grad():
        next(p for p in other.module.parameters() if p.dim() == 2).mul_(1.01)
    changed = run(other.capture(), "size<=0.5x", cache=Cache(tmp_path)).plan["choice"]
    assert changed["sensitivity"]["cached"] == 0


def test_estimates_follow_the_exact_losses() -> None:
    program = tiny.decoder(width=64).capture()
    exact = run(program, "size<=0.4x", options={"sensitivity": "exact"}).plan["choice"]
    cheap = run(
        program, "size<=0.4x", options={"sensitivity": "estimate", "exact_tflop": 1e-9}
    ).plan["choice"]
    assert exact["sensitivity"]["estimated"] == 0
    assert cheap["sensitivity"]["estimated"] > 0
    assert cheap["sensitivity"]["exact"] < exact["sensitivity"]["exact"]
    ratios = [
        math.log(b["loss"] / a["loss"])
        for path, row in exact["layers"].items()
        for a, b in zip(row["candidates"], cheap["layers"][path]["candidates"], strict=True)
        if a.get("loss", 0) > 0 and b.get("loss_source") == "estimated"
    ]
    # Half of them within a factor of two and a half: what the choice needs is their order.
    assert sorted(map(abs, ratios))[len(ratios) // 2] < math.log(2.5)


def test_a_swap_runs_only_what_follows_and_gives_the_same_loss() -> None:
    from mopt.passes.choose._place import place
    from mopt.passes.choose._sensitivity import Losses

    program = decoder()
    calls = [(program.args, program.kwargs)]
    short = Losses(program, PassContext(), calls, "cosine", place)
    whole = Losses(program, PassContext(max_memory_bytes=1), calls, "cosine", place)
    path = next(p for p in run(program, "size<=0.4x").plan["formats"] if p.endswith(("up", "q")))
    for name in ("int8-dynamic", "int4-g32"):
        assert short.exact({path: name}) == whole.exact({path: name}) > 0


def test_static_int8_for_convolutions_when_there_is_data() -> None:

    program = tiny.small_cnn().capture()
    data = Calibration([program.args], program)
    result = run(program, "minimize=latency", "quality>=0.9", calibration=data)
    assert "int8-qdq" in {n.removesuffix("-reduced") for n in result.plan["formats"].values()}


class Chain(nn.Module):
    """Convolutions with nothing but a relu between them, and one behind a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.sigmoid(self.second(torch.relu(self.first(x)))))


def chain(border: float, *texts: str, **more: Any) -> dict[str, Any]:
    from mopt.frontend import capture

    program = capture(Chain().eval(), (torch.randn(2, 8, 6, 6),))
    data = Calibration([program.args], program)
    model = TableModel(border)
    done = run(program, *texts, cost_model=model, calibration=data, **more)
    choice: dict[str, Any] = done.plan["choice"]
    return choice


def test_conversions_between_neighbours_in_8_bits_cost_nothing() -> None:
    # Half of a border is the input's: alone 0.3 + 0.8 is slower than 1, two in a row are not.
    choice = chain(0.8, "minimize=latency", "quality>=0.5")
    kept = {path: row["chosen"].removesuffix("-reduced") for path, row in choice["layers"].items()}
    assert kept == {"first": "int8-qdq", "second": "int8-qdq", "third": "original"}
    weights = 8 * 8 * 9 / 1e6
    assert choice["estimated"]["latency"] == pytest.approx((2 * 1.1 - 0.8 + 1) * weights)


def test_no_layer_is_slower_where_it_was_chosen() -> None:
    # The budget on size would take all of them.
    only = {"options": {"formats": "int8-qdq"}}
    strict = chain(0.8, "minimize=size", "quality>=0.5", **only)
    third = strict["layers"]["third"]
    assert third["chosen"] == "original"
    assert any("slower among its neighbours" in c.get("reason", "") for c in third["candidates"])
    assert strict["least_if_slower"]["size"] < strict["estimated"]["size"]
    loose = chain(0.8, "minimize=size", "quality>=0.5", allow_slower=True, **only)
    assert all(row["chosen"].startswith("int8-qdq") for row in loose["layers"].values())
    # Among all formats there is one that is as small, and computed with as floats are.
    free = chain(0.8, "minimize=size", "quality>=0.5")
    assert free["layers"]["third"]["chosen"] == "int8-stored"


def test_a_layer_that_was_timed_slower_gets_another_format() -> None:
    program = tiny.mlp(64, 64).capture()
    first = run(program, "minimize=latency", "quality>=0.99").plan
    path, name = next(iter(first["formats"].items()))
    seen = Observation(first["formats"], first["choice"]["estimated"], {},
                       slower_layers=frozenset([path]))  # fmt: skip
    then = run(program, "minimize=latency", "quality>=0.99", observations=(seen,)).plan
    assert then["formats"].get(path) != name
    assert {p: f for p, f in then["formats"].items() if p != path} == {
        p: f for p, f in first["formats"].items() if p != path
    }
    reasons = [c.get("reason", "") for c in then["choice"]["layers"][path]["candidates"]]
    assert any("measured slower in the whole model" in reason for reason in reasons)


def test_what_neighbours_cost_together_is_measured() -> None:
    program = tiny.mlp(64, 64).capture()
    texts = ("minimize=size", "quality>=0.9")
    alone = run(program, *texts, options={"pairs": 0, "formats": "int4-g32"}).plan["choice"]
    joint = run(program, *texts, options={"formats": "int4-g32"}).plan["choice"]
    assert alone["pairs"] == 0
    assert joint["pairs"] == joint["sensitivity"]["pairs"] == 1
    # Both layers are in the pair and nothing else is lost: the estimate is what is measured.
    from mopt.passes.choose._place import place
    from mopt.passes.choose._sensitivity import Losses

    losses = Losses(program, PassContext(), [(program.args, program.kwargs)], "cosine", place)
    both = losses.exact({path: "int4-g32" for path in joint["layers"]})
    assert joint["estimated"]["loss"] == pytest.approx(both)
    assert alone["estimated"]["loss"] != pytest.approx(both, rel=1e-3)


def test_losses_of_neighbours_shrink_with_the_losses_that_fitting_leaves() -> None:
    """Terms of pairs at the scale of nearest codes outweighed fitted ones: sums below zero."""
    torch.manual_seed(0)
    x = torch.randn(64, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(64, 64)
    program = mopt.capture(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval(), (x,))
    found = {}
    for rounding in ("nearest", "fitted"):
        done = run(
            program, "minimize=size", "quality>=0.2", calibration=Calibration([(x,)], program),
            options={"formats": "int4-g32", "rounding": rounding, "widths": False},
        )  # fmt: skip
        choice = done.plan["choice"]
        assert choice["pairs"] == 3
        alone = sum(
            one["loss"] for row in choice["layers"].values() for one in row["candidates"]
            if one["format"] == "int4-g32"
        )  # fmt: skip
        found[rounding] = choice["estimated"]["loss"] / alone
    assert found["nearest"] > 0
    assert found["fitted"] == pytest.approx(found["nearest"], rel=1e-6)


def test_two_neighbours_never_cost_less_than_the_dearer_one() -> None:
    from mopt.passes.choose._neighbours import interactions
    from mopt.passes.choose._options import Option, Sites

    sites = [
        Sites(
            str(i),
            (),
            ModelSize(0, 0),
            [Option("original", {}, 0, 0), Option("a", {str(i): "a"}, 0, 0, loss=loss)],
        )
        for i, loss in enumerate((0.3, 0.1, 0.2))
    ]
    terms = interactions(sites, lambda formats: 0.0, 9)
    assert sum(one.loss for one in terms) == pytest.approx(-0.2)


def test_a_table_and_a_head_that_share_their_weight_share_the_format() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 32)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.table(ids), self.table.weight)

    from mopt.frontend import capture

    program = capture(Tied().eval(), (torch.arange(8)[None],))
    result = run(program, "minimize=size", "quality>=0.5")
    names = {name.removesuffix("-reduced") for name in result.plan["formats"].values()}
    assert names == {"int8-dynamic", "int8-row"}
    # A quarter for the codes, stored once, and scales for rows of only 32 values.
    assert result.size_bytes() < 0.35 * program.size_bytes()
    assert any("stored a second time" in c.get("reason", "")
               for row in result.plan["choice"]["layers"].values()
               for c in row["candidates"])  # fmt: skip


def test_a_budget_on_latency_needs_a_cost_model() -> None:
    with pytest.raises(PassError, match="needs a cost model"):
        run(tiny.mlp(64, 64).capture(), "latency<=0.5x", cost_model=None)


def test_a_budget_on_energy_needs_energies() -> None:
    with pytest.raises(UsageError, match="no estimate of energy"):
        run(tiny.mlp(64, 64).capture(), "energy<=5mJ")


@pytest.mark.parametrize(("limit", "share"), [("energy<=0.55x", 0.55), ("energy<=1e-9mJ", 0.0)])
def test_energy_can_be_limited(limit: str, share: float) -> None:
    program = tiny.mlp(64, 64).capture()
    costs = TableModel(millijoules=3.0)
    whole = sum(math.prod(program.weight(n).shape) for n in program.nodes
                if n.op == "get_attr" and program.weight(n).ndim == 2) * 3e-6  # fmt: skip
    baseline = Baseline(program.size_bytes(), energy_mj=whole)
    found = run(program, limit, "minimize=loss", cost_model=costs, baseline=baseline)
    choice = found.plan["choice"]
    if share:
        assert choice["estimated"]["energy"] <= share * whole and not choice["excess"]
    else:
        assert choice["excess"]["energy"] > 0
    assert choice["binding"] == ["energy"]


def test_unknown_formats_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match="no format is called 'int5'"):
        make_pass("choose-formats", {"formats": "int5"})


@pytest.mark.parametrize(
    ("last", "expected"),
    [([], True), ([nn.Unflatten(-1, (2, 4))], True), ([nn.LayerNorm(8)], False),
     ([nn.Tanh()], False)],
)  # fmt: skip
def test_only_what_a_layer_gives_is_a_logit(last: list[nn.Module], expected: bool) -> None:
    """A divergence of the softmax says nothing about an embedding."""
    program = mopt.capture(nn.Sequential(nn.Linear(4, 8), *last).eval(), (torch.randn(2, 4),))
    assert gives_logits(program) is expected


@pytest.mark.parametrize(
    ("rows", "asked", "taken"), [(1, 0, 8), (100, 0, 6), (512, 0, 1), (600, 0, 1), (1, 3, 3)]
)
def test_losses_are_measured_on_rows_enough(rows: int, asked: int, taken: int) -> None:
    program = tiny.sample(nn.Linear(8, 4), tiny.normal(rows, 8)).capture()
    data = [((tiny.normal(rows, 8, seed=index),), {}) for index in range(10)]
    found = enough_batches(program, data, asked)
    assert [args[0] is data[index][0][0] for index, (args, _) in enumerate(found)] == [True] * taken
    assert len(enough_batches(program, data[:2], asked)) == min(taken, 2)


def test_losses_by_the_users_metric() -> None:
    sample = tiny.mlp(64, 64)
    program = sample.capture()

    def evaluate(call: Any) -> float:
        return (
            -float((call(*sample.inputs) - sample.module(*sample.inputs)).detach().abs().mean())
            - 1.0
        )

    result = run(program, "size<=0.4x", options={"loss": "metric"}, evaluate=evaluate)
    assert result.plan["choice"]["estimated"]["loss"] > 0
    without = PassContext(**budget("size<=0.4x"))
    with pytest.raises(PassError, match="needs a metric"):
        Pipeline([make_pass("choose-formats", {"loss": "metric"})]).run(
            program, replace(without, evaluate=None)
        )


def test_low_ranks_are_candidates_where_much_may_be_lost() -> None:
    torch.manual_seed(0)
    thin = nn.Linear(64, 64)
    with torch.no_grad():  # of rank 8, nearly
        thin.weight.copy_(torch.randn(64, 8) @ torch.randn(8, 64) / 8 + 1e-4 * torch.randn(64, 64))
    program = mopt.capture(
        nn.Sequential(thin, nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).eval(),
        (torch.randn(32, 64),),
    )
    options = {"formats": "low-rank-25"}
    done = run(program, "minimize=size", "quality>=0.95", options=options)
    chosen = {path: row["chosen"] for path, row in done.plan["choice"]["layers"].items()}
    assert chosen["0"] == "low-rank-25"
    assert done.plan["formats"]["0"] == "low-rank-25"
    assert done.size_bytes() < program.size_bytes()
    strict = run(program, "minimize=size", "quality>=0.9999999")
    every = {c["format"] for row in strict.plan["choice"]["layers"].values()
             for c in row["candidates"]}  # fmt: skip
    assert not any("low-rank" in name for name in every)
    loose = run(program, "minimize=size", "quality>=0.95")
    candidates = loose.plan["choice"]["layers"]["0"]["candidates"]
    assert {"low-rank-50", "low-rank-25"} <= {c["format"] for c in candidates}


def test_weights_that_are_widened_save_no_memory() -> None:
    from mopt.passes.choose._options import fill_options, read_sites

    program = mopt.capture(nn.Sequential(nn.Linear(64, 64)).eval(), (torch.randn(64, 64),))
    sites, _ = read_sites(program, lambda path: True, 0)
    names = {"linear": ["int8-dynamic", "int4-g32", "int8-stored"]}
    fill_options(program, sites, names, None, allow_slower=True)
    original, dynamic, *widened = sites[0].options
    assert dynamic.memory_bytes == dynamic.size_bytes < original.size_bytes
    assert {option.memory_bytes for option in widened} == {original.size_bytes}
    assert all(option.size_bytes < original.size_bytes for option in widened)
    limits = Limits("size", {}, {}, 1.0)
    (group,) = make_problem(sites, limits, Corrections()).groups
    assert [c.amount("memory") for c in group.candidates] == [
        option.memory_bytes for option in sites[0].options
    ]


def test_losses_are_those_of_fitted_codes_where_codes_will_be_fitted() -> None:
    from mopt.passes.choose._place import place
    from mopt.passes.choose._sensitivity import Losses

    torch.manual_seed(0)
    x = torch.randn(64, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(64, 64)
    program = mopt.capture(nn.Sequential(nn.Linear(64, 64)).eval(), (x,))
    data = Calibration([(x,)], program)
    options = {"formats": "int4-g32"}
    found = {}
    for rounding in ("nearest", "fitted"):
        done = run(program, "minimize=size", "quality>=0.5", calibration=data,
                   options={**options, "rounding": rounding})  # fmt: skip
        (row,) = done.plan["choice"]["layers"].values()
        assert row["chosen"] == "int4-g32"
        found[rounding] = done.plan["choice"]["estimated"]["loss"]
    losses = Losses(program, PassContext(calibration=data), [((x,), {})], "cosine", place)
    fitted = losses.exact({next(iter(done.plan["choice"]["layers"])): "int4-g32"}, fitted=True)
    assert found["fitted"] == pytest.approx(fitted, rel=1e-6)
    assert found["fitted"] < 0.7 * found["nearest"]


class _Padded(nn.Module):
    """A layer that every position goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * attention_mask[..., None].clamp(min=1)


def test_padded_positions_do_not_count() -> None:
    x, mask = tiny.normal(1, 8, 64), torch.ones(1, 8, dtype=torch.long)
    mask[:, 5:] = 0
    wild = x.clone()
    wild[:, 5:] *= 30 * torch.linspace(0, 1, 64)
    program = tiny.sample(_Padded(), x, mask).capture()
    ctx = PassContext()

    def loss(value: torch.Tensor, rows: torch.Tensor, kind: str) -> float:
        return Losses(program, ctx, [((value, rows), {})], kind, place).exact({"layer": "int4-g32"})

    for kind in ("cosine", "kl"):
        short = loss(x[:, :5], mask[:, :5], kind)
        assert 0 < short == pytest.approx(loss(wild, mask, kind), rel=1e-6)
        assert loss(wild, torch.ones_like(mask), kind) != pytest.approx(short, rel=1e-2)
