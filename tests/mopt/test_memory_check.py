"""The checker of memory plans finds what is planted, and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mopt.errors import InternalError
from mopt.memory import Buffer, Gap, MemoryPlan, MemoryProblem, Status, Tier
from mopt.memory_check import check_plan, require_legal

PROBLEM = MemoryProblem((
    Buffer("a", 0, 4, 8), Buffer("b", 2, 6, 8, alignment=4), Buffer("c", 4, 8, 8),
    Buffer("v", 6, 9, 4, alias="c"),
))  # fmt: skip
GOOD = MemoryPlan({"a": 0, "b": 8, "c": 0, "v": 0}, 16, 16, Status.OPTIMAL, "hand")


def test_a_good_plan() -> None:
    assert check_plan(PROBLEM, GOOD) == []
    require_legal(PROBLEM, GOOD)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ({"a": 0, "b": 8, "c": 0}, "'v' has no offset"),
        ({**GOOD.offsets, "z": 0}, "'z' has an offset and is no buffer"),
        ({**GOOD.offsets, "a": -4}, "'a' lies at -4"),
        ({**GOOD.offsets, "b": 9}, "no multiple of its alignment 4"),
        ({**GOOD.offsets, "v": 4}, "'v' lies at 4, its base 'c' at 0"),
        ({**GOOD.offsets, "b": 4}, "at step 2 'b' uses bytes 4 to 12 and 'a' uses 0 to 8"),
    ],
)
def test_planted_faults_of_places(offsets: dict[str, int], words: str) -> None:
    assert any(words in line for line in check_plan(PROBLEM, replace(GOOD, offsets=offsets)))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"peak": 17}, "the peak is 16, the plan says 17"),
        ({"lower_bound": 17}, "the bound 17 is above the peak 16"),
        ({"lower_bound": 15}, "optimal, but the bound is 15"),
        ({"lower_bound": 15, "status": Status.FEASIBLE}, "the bound 15 is below the load 16"),
        ({"tier_peaks": {"main": 3}}, "the peak of tier 'main' is 16, the plan says 3"),
    ],
)
def test_planted_faults_of_claims(changed: dict[str, object], words: str) -> None:
    plan = replace(GOOD, **changed)  # type: ignore[arg-type]
    assert any(words in line for line in check_plan(PROBLEM, plan))


def test_a_plan_that_claims_to_fit_fits() -> None:
    small = MemoryProblem(PROBLEM.buffers, 15)
    assert "tier 'main' holds 15 bytes, the plan needs 16" in check_plan(small, GOOD)
    assert check_plan(small, replace(GOOD, status=Status.INFEASIBLE)) == []
    with pytest.raises(InternalError, match="hand: tier 'main' holds 15") as caught:
        require_legal(small, GOOD)
    assert caught.value.code == "memory-plan"


def test_fixed_places_tiers_and_gaps() -> None:
    fixed = MemoryProblem((Buffer("a", 0, 4, 8, offset=8),))
    moved = MemoryPlan({"a": 0}, 8, 8, Status.OPTIMAL, "hand")
    assert "'a' lies at 0 and is fixed at 8" in check_plan(fixed, moved)
    apart = MemoryProblem((Buffer("a", 0, 4, 8), Buffer("b", 0, 4, 8, tier="flash")),
                          tiers=(Tier("flash"),))  # fmt: skip
    plan = MemoryPlan({"a": 0, "b": 0}, 8, 8, Status.OPTIMAL, "hand")
    assert check_plan(apart, plan) == []
    window = Buffer("a", 0, 6, 8, gaps=(Gap(2, 4, (6, 8)),))
    low = MemoryProblem((window, Buffer("b", 2, 4, 6)))
    assert check_plan(low, plan) == []
    high = MemoryProblem((window, Buffer("b", 2, 4, 7)))
    assert any("at step 2" in line for line in check_plan(high, plan))


def test_overlaps_are_those_of_all_pairs() -> None:
    rng = random.Random(7)
    for _ in range(200):
        buffers = []
        for k in range(rng.randint(1, 12)):
            lower = rng.randint(0, 8)
            size, upper = rng.randint(0, 6), lower + rng.randint(1, 4)
            buffers.append(Buffer(str(k), lower, upper, size))
        offsets = {b.id: rng.randint(0, 40) for b in buffers}
        problem = MemoryProblem(tuple(buffers))
        top = max((offsets[b.id] + b.size for b in buffers if b.size), default=0)
        load = problem.peak_load().bytes
        plan = MemoryPlan(offsets, top, min(load, top), Status.FEASIBLE, "random")
        clash = any(
            a.size and b.size and a.id < b.id
            and a.lower < b.upper and b.lower < a.upper
            and offsets[a.id] < offsets[b.id] + b.size
            and offsets[b.id] < offsets[a.id] + a.size
            for a in buffers for b in buffers
        )  # fmt: skip
        found = [line for line in check_plan(problem, plan, limit=99) if "at step" in line]
        assert bool(found) == clash
