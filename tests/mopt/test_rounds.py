"""Closing the loop: which of several built choices is taken, and when the search ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mopt.budget import Budget
from mopt.choice import Baseline, Observation
from mopt.cost import Cost, ModelCost
from mopt.passes.choose._limits import Corrections
from mopt.rounds import Attempt, close_loop, estimate_error


class Made:
    """A program of the loop: the formats that were chosen for it."""

    def __init__(self, name: str, **choice: Any) -> None:
        self.name = name
        self.plan: dict[str, Any] = {"formats": {"layer": name} if name else {}, "choice": choice}

    def parts(self) -> dict[str, Made]:
        return {"": self}


class Built(Attempt):
    """An attempt whose measured values are given."""

    def __init__(
        self, made: Made, size: float, ratio: float, quality: float = 1.0,
        slower: dict[str, tuple[float, float]] | None = None,
    ) -> None:  # fmt: skip
        self.result = made  # type: ignore[assignment]
        self.slower_layers = slower or {}
        self.size, self.ratio, self.kept_ = size, ratio, quality

    def values(self, baseline: Any) -> dict[str, tuple[float | None, float | None]]:
        return {
            "size": (self.size, 100.0), "latency": (10 * self.ratio, 10.0),
            "memory": (self.size, 100.0), "quality": (self.kept_, 1.0), "energy": (None, None),
        }  # fmt: skip

    @property
    def is_slower(self) -> bool:
        return self.ratio > 1.02

    def observation(self, baseline: Any) -> Observation:
        return Observation(self.formats, {}, {"size": self.size}, is_slower=self.is_slower)


def loop(
    names: list[str], built: dict[str, Built], *texts: str, allow_slower: bool = False
) -> tuple[Attempt, list[dict[str, Any]]]:
    turns = iter(names)
    for one in built.values():
        one.artifact = type("Files", (), {"size_bytes": one.size})()
        one.timing = None
        one.quality = type("Kept", (), {"kept": lambda self, one=one: one.kept_})()
    return close_loop(
        lambda seen: built[next(turns)].result, lambda made: built[made.name],  # type: ignore[attr-defined]
        lambda: built[""].result, Budget.parse(texts), None,  # type: ignore[arg-type]
        allow_slower=allow_slower,
    )  # fmt: skip


def test_a_budget_thought_out_of_reach_is_solved_again_for_the_loss() -> None:
    far = Made("a", minimize="loss", excess={"latency": 1.0})
    built = {"a": Built(far, 40, 0.4, 0.95), "b": Built(Made("b", minimize="loss"), 40, 0.45, 0.99)}
    best, story = loop(["a", "b"], built, "latency<=0.5x")
    assert (best.formats, len(story)) == ({"layer": "b"}, 2)
    # Who asked for the least time has what he asked for.
    built["a"] = Built(Made("a", minimize="latency", excess={"loss": 1.0}), 40, 0.4, 0.95)
    assert len(loop(["a"], built, "latency<=0.5x")[1]) == 1


def test_the_first_that_meets_the_budget_ends_the_search() -> None:
    built = {"a": Built(Made("a"), 40, 0.5)}
    best, story = loop(["a"], built, "size<=50B")
    assert best is built["a"]
    assert [round_["missed"] for round_ in story] == [[]]


def test_a_missed_budget_is_tried_again_and_the_nearest_is_kept() -> None:
    built = {"a": Built(Made("a"), 70, 0.5), "b": Built(Made("b"), 55, 0.6),
             "c": Built(Made("c"), 60, 0.4)}  # fmt: skip
    best, story = loop(["a", "b", "c"], built, "size<=50B")
    assert best is built["b"]
    assert len(story) == 3
    assert "found 55" in story[1]["missed"][0]


def test_the_same_choice_again_ends_the_search() -> None:
    built = {"a": Built(Made("a"), 70, 0.5)}
    best, story = loop(["a", "a"], built, "size<=50B")
    assert best is built["a"] and len(story) == 1


def test_what_is_slower_when_measured_is_not_taken() -> None:
    built = {"": Built(Made(""), 100, 1.0), "a": Built(Made("a"), 40, 1.3),
             "b": Built(Made("b"), 45, 0.9), "c": Built(Made("c"), 30, 1.2)}  # fmt: skip
    assert loop(["a", "b"], built, "size<=50B")[0] is built["b"]
    slow, story = loop(["a", "c", "a"], built, "size<=50B")
    assert slow is built[""]
    assert "every choice was slower" in slow.result.plan["choice"]["kept_all"]
    assert all(round_["slower"] for round_ in story)
    assert loop(["a"], built, "size<=50B", allow_slower=True)[0] is built["a"]


def test_a_layer_that_turned_out_slower_is_chosen_again() -> None:
    built = {"a": Built(Made("a"), 40, 0.5, 0.95, slower={"layer": (1.0, 1.5)}),
             "b": Built(Made("b"), 42, 0.6, 0.99), "c": Built(Made("c"), 42, 0.6, 0.9)}  # fmt: skip
    best, story = loop(["a", "b"], built, "size<=50B")
    assert best is built["b"]
    assert story[0]["slower_layers"] == {"layer": [1.0, 1.5]}
    # The model as a whole decides.
    assert loop(["a", "c"], built, "size<=50B")[0] is built["a"]
    assert len(loop(["a"], built, "size<=50B", allow_slower=True)[1]) == 1


def test_where_only_quality_is_limited_the_uncompressed_model_is_within() -> None:
    built = {"": Built(Made(""), 100, 1.0), "a": Built(Made("a"), 40, 0.5, 0.8)}
    best, story = loop(["a", "a"], built, "quality>=0.9x", "minimize=size")
    assert best is built[""]
    assert "lost more quality" in best.result.plan["choice"]["kept_all"]
    assert story[0]["missed"]


def test_energy_is_judged_by_the_estimate() -> None:
    costs = [ModelCost(Cost(1.0, energy_mj=mj), ()) for mj in (2.0, 8.0)]
    kept = SimpleNamespace(kept=lambda: 1.0)
    built = Attempt(Made("a"), SimpleNamespace(size_bytes=1), None, kept, None, *costs)  # type: ignore[arg-type]
    files: Any = SimpleNamespace(size_bytes=2)
    assert built.missed(Budget.parse("energy<=0.3x"), files) == []
    (missed,) = built.missed(Budget.parse("energy<=1mJ"), files)
    assert "estimated 2, limit 1" in missed
    assert built.observation(files).measured["energy"] == 2.0


def test_errors_of_estimates_are_relative_to_what_was_measured() -> None:
    story = [{"estimated": {"size": 90.0, "latency": 2.0}, "measured": {"size": 100.0},
              "layers": 1}]  # fmt: skip
    assert estimate_error(Built(Made("a"), 100, 1.0), story) == {"size": pytest.approx(-0.1)}


@pytest.mark.parametrize(
    ("ratio", "band", "texts", "factor"),
    [
        # Half the time was hoped for, and that is within what was measured.
        (0.55, (0.45, 0.65), (), None),
        (0.75, (0.7, 0.8), (), 0.5),
        # The budget was missed by what was measured: the estimate misled.
        (0.55, (0.45, 0.65), ("latency<=0.5x",), 0.9),
        (1.2, (1.1, 1.3), (), -0.4),
    ],
)
def test_savings_are_corrected_where_the_measurement_is_sure(
    ratio: float, band: tuple[float, float], texts: tuple[str, ...], factor: float | None
) -> None:
    seen = Observation(
        {"layer": "int8-dynamic"}, {"raw_latency": 5.0, "whole_latency": 10.0, "size": 1.0},
        {"latency": 20 * ratio}, {"latency": 20.0}, is_slower=band[0] > 1, speed_band=band,
    )  # fmt: skip
    learned = Corrections.learn([seen], Baseline(100, 10.0), Budget.parse(texts))
    expected = {} if factor is None else {"int8-dynamic": pytest.approx(factor)}
    assert learned.savings == expected
    assert learned.speed == pytest.approx(2.0)
