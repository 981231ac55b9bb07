"""Problems of two memories, the judge of their plans, and the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mopt.errors import InputError, InternalError, UsageError
from mopt.memory import Status
from mopt.tier_check import check_tiers, require_sound
from mopt.tier_times import Link, run_plan
from mopt.tiers import Spill, Stay, TierPlan, TierProblem, TierStep, TierValue, Window

VALUES = (
    TierValue("x", 64, given=True), TierValue("a", 128), TierValue("b", 256),
    TierValue("y", 64, kept=True),
)  # fmt: skip
STEPS = (
    TierStep("s0", ("x",), ("a",), seconds=1),
    TierStep("s1", ("x",), ("b",), seconds=1),
    TierStep("s2", ("a", "b"), ("y",), before=("s0", "s1"), seconds=1),
)
PROBLEM = TierProblem(STEPS, VALUES, 320, 16, 16)
# a leaves while b is made and comes back; x is read twice through a window, y is written.
PLAN = TierPlan(
    order=("s0", "s1", "s2"),
    stays=(Stay("a", 0, 128, 0, 1, 0, False), Stay("b", 0, 256, 1, 3, 0, False)),
    spills=(Spill("y", 0, 64, 2, 3, 128), Spill("a", 0, 128, 0, 3, 0)),
    windows=(Window("x", 0, 128, 16), Window("x", 1, 256, 16), Window("a", 2, 256, 16),
             Window("y", 2, 272, 16)),
    workspaces={}, moved_bytes=64 + 64 + 64 + 128 + 128, compulsory_bytes=128, lower_bound=128,
    status=Status.FEASIBLE, peak=288, slow_bytes=192,
)  # fmt: skip


def test_a_sound_plan_is_accepted() -> None:
    assert check_tiers(PROBLEM, PLAN) == []
    require_sound(PROBLEM, PLAN)
    assert (PLAN.extra_bytes, PLAN.extra_bound) == (320, 0)
    moves = [(m.buffer, m.at, m.to) for m in PLAN.moves()]
    assert moves == [("a", 0, "main"), ("b", 1, "main"), ("a", 1, "slow"), ("y", 3, "slow")]
    assert PLAN.to_data()["stays"][0]["value"] == "a"


def _windows(*kept: int) -> tuple[Window, ...]:
    return tuple(PLAN.windows[n] for n in kept)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda p: replace(p, order=("s0", "s2", "s1")), "runs before one"),
        (lambda p: replace(p, order=("s0", "s1")), "none of the problem's steps"),
        (lambda p: replace(p, spills=p.spills[:1]), "are nowhere"),
        (lambda p: replace(p, spills=p.spills[1:]), "neither kept nor written"),
        (lambda p: replace(p, windows=_windows(0, 1, 2)), "without a window"),
        (lambda p: replace(p, windows=(replace(p.windows[0], offset=64), *_windows(1, 2, 3))),
         "two owners at 0"),
        (lambda p: replace(p, stays=(p.stays[0], replace(p.stays[1], loaded=True))),
         "from where it is not"),
        (lambda p: replace(p, stays=(p.stays[0], replace(p.stays[1], lower=0))),
         "does not make it"),
        (lambda p: replace(p, stays=(*p.stays, replace(p.stays[1], offset=512))), "twice at 1"),
        (lambda p: replace(p, spills=(replace(p.spills[0], offset=0), p.spills[1])),
         "slow memory has two owners"),
        (lambda p: replace(p, moved_bytes=300), "448 bytes move"),
        (lambda p: replace(p, peak=300), "used up to 288"),
        (lambda p: replace(p, compulsory_bytes=64), "128 bytes are compulsory"),
        (lambda p: replace(p, lower_bound=1000), "is above the 448"),
        (lambda p: replace(p, status=Status.OPTIMAL), "optimal, but"),
        (lambda p: replace(p, stays=(replace(p.stays[0], offset=8), p.stays[1])), "multiple of 16"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(edit: Callable[[TierPlan], TierPlan], said: str) -> None:
    wrong = check_tiers(PROBLEM, edit(PLAN))
    assert any(said in line for line in wrong), wrong
    with pytest.raises(InternalError) as caught:
        require_sound(PROBLEM, edit(PLAN))
    assert caught.value.code == "tier-plan"


def test_a_plan_that_needs_too_much_room_is_refused() -> None:
    small = replace(PROBLEM, fast_bytes=280)
    assert any("holds 280" in line for line in check_tiers(small, PLAN))


def test_a_product_may_not_stream_both_factors() -> None:
    steps = (*STEPS[:2], replace(STEPS[2], one_of=(("a", "b"),)))
    problem = TierProblem(steps, VALUES, 320, 16, 16)
    assert check_tiers(problem, PLAN) == []
    streams = replace(
        PLAN, stays=PLAN.stays[:1], spills=(*PLAN.spills, Spill("b", 0, 256, 1, 3, 192)),
        windows=(*PLAN.windows, Window("b", 1, 0, 16), Window("b", 2, 0, 16)),
        moved_bytes=PLAN.moved_bytes + 512,
    )  # fmt: skip
    assert check_tiers(PROBLEM, streams) == []
    assert (
        "s2" in check_tiers(problem, streams)[0] and "at once" in check_tiers(problem, streams)[0]
    )


@pytest.mark.parametrize(
    ("steps", "values", "code"),
    [
        ((TierStep("s", ("x",)), TierStep("s")), VALUES, "tier-steps"),
        ((TierStep("s", ("z",)),), VALUES, "tier-steps"),
        ((TierStep("s", before=("t",)), TierStep("t")), VALUES, "tier-steps"),
        ((TierStep("s", makes=("x",)),), VALUES, "tier-steps"),
        ((TierStep("s", ("x",)),), (TierValue("x", 60, given=True),), "tier-steps"),
        ((TierStep("s", ("x",)),), (TierValue("x", -16, given=True),), "tier-steps"),
        ((TierStep("s", workspace=400),), VALUES, "fast-memory-too-small"),
        ((TierStep("s", ("x",), one_of=(("x",),), workspace=272),), VALUES,
         "fast-memory-too-small"),
    ],
)  # fmt: skip
def test_bad_problems(
    steps: tuple[TierStep, ...], values: tuple[TierValue, ...], code: str
) -> None:
    with pytest.raises(InputError) as caught:
        TierProblem(steps, values, 320, 16, 16)
    assert caught.value.code == code


def test_times_of_a_plan() -> None:
    free = run_plan(PROBLEM, PLAN, Link(1e12))
    assert free.seconds == pytest.approx(3) and free.stall_seconds == pytest.approx(0, abs=1e-6)
    assert (free.read_bytes, free.written_bytes) == (64 + 64 + 128, 128 + 64)
    # 64 B/s: x streams in 1 s beside each step, then a is written for 2 s before b may lie there,
    # a is read for 2 s beside the last step, y written for 1 s after it.
    slow = run_plan(PROBLEM, PLAN, Link(64.0))
    assert [round(e.end, 6) for e in slow.events if e.kind == "step"] == [1, 4, 5]
    assert slow.seconds == pytest.approx(7)
    both = run_plan(PROBLEM, PLAN, Link(64.0, both_ways=True))
    assert both.seconds == pytest.approx(6)
    assert slow.link_seconds == pytest.approx(7)


@pytest.mark.parametrize("latency", [0.0, 0.01])
def test_a_faster_link_is_never_slower(latency: float) -> None:
    times = [run_plan(PROBLEM, PLAN, Link(rate, latency)).seconds for rate in (8, 64, 512, 4096)]
    assert times == sorted(times, reverse=True)


def test_flash_reads_faster_in_larger_chunks() -> None:
    flash = Link(6e9, 100e-6, requests=8, lane=1.2e9)
    rates = [flash.rate(4096 * 4**n) for n in range(5)]
    assert rates == sorted(rates)
    assert flash.rate(1 << 24) == 6e9
    # 8 requests of 32 KiB each: 8 * 32768 / (100 us + 27.3 us).
    assert flash.rate(32768) == pytest.approx(8 * 32768 / (100e-6 + 32768 / 1.2e9))
    assert flash.rate(flash.chunk(1 << 24)) >= 0.9 * 6e9
    assert flash.chunk(5000) == 4096
    assert flash.seconds(0) == 0


@pytest.mark.parametrize("wrong", [{"bandwidth": 0}, {"latency": -1.0}, {"requests": 0}])
def test_links_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        Link(**{"bandwidth": 1e9, **wrong})  # type: ignore[arg-type]
    assert caught.value.code == "link"
