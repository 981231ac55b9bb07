"""Budgets are read exactly, and anything unclear is refused with what to write instead."""

from __future__ import annotations

import pytest

from mopt.budget import Budget
from mopt.errors import UsageError


@pytest.mark.parametrize(
    ("text", "what", "value", "relative"),
    [
        ("size<=25MB", "size", 25e6, False),
        ("size <= 1 GiB", "size", 2**30, False),
        ("latency<=8ms", "latency", 8.0, False),
        ("latency<=250us", "latency", 0.25, False),
        ("latency<=0.5x", "latency", 0.5, True),
        ("memory<=64MiB", "memory", 64 * 2**20, False),
        ("quality>=0.99", "quality", 0.99, True),
        ("quality>=0.99x", "quality", 0.99, True),
        ("energy<=5mJ", "energy", 5.0, False),
    ],
)
def test_units(text: str, what: str, value: float, relative: bool) -> None:
    (constraint,) = Budget.parse(text).constraints
    assert (constraint.what, constraint.value, constraint.relative) == (what, value, relative)


@pytest.mark.parametrize(
    ("texts", "code", "says"),
    [
        (["size<25MB"], "bad-budget", "limited with <="),
        (["size<=25"], "bad-budget-unit", "MB"),
        (["size<=25ms"], "bad-budget-unit", "'ms'"),
        (["quality<=0.99"], "bad-budget", "limited with >="),
        (["size<=0MB"], "bad-budget", "positive"),
        (["size<=-3MB"], "bad-budget", "positive"),
        (["sise<=25MB"], "unknown-budget", "'size'"),
        (["latency"], "bad-budget", "latency<=0.5x"),
        (["size<=25MB", "size<=20MB"], "contradictory-budget", "two budgets for size"),
        (["minimize=size", "minimize=loss"], "contradictory-budget", "one can be made least"),
        (["minimize=speed"], "unknown-objective", "latency"),
        (["size<=1e999MB"], "bad-budget", "positive"),
    ],
)
def test_refusals(texts: list[str], code: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(texts)
    assert caught.value.code == code
    assert says in str(caught.value)


def test_round_trip_and_objective() -> None:
    budget = Budget.parse(["size<=3MB", "minimize=latency"])
    assert budget.minimize == "latency"
    assert Budget.parse(budget.texts()) == budget


def test_limits_relative_to_the_baseline() -> None:
    budget = Budget.parse(["latency<=0.5x", "quality>=0.9"])
    latency, quality = budget.get("latency"), budget.get("quality")
    assert latency is not None and quality is not None
    assert latency.is_met(4.9, 10.0) and not latency.is_met(5.1, 10.0)
    assert quality.is_met(0.91, 1.0) and not quality.is_met(0.89, 1.0)
