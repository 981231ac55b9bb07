"""The nouns of memory planning: what they refuse, and what shares memory with what."""

from __future__ import annotations

import json

import pytest

from mopt.errors import InputError
from mopt.memory import Buffer, Gap, MemoryPlan, MemoryProblem, Piece, Status, Tier


@pytest.mark.parametrize(
    ("changed", "code", "field", "words"),
    [
        ({"lower": -1}, "buffer-lifetime", "lower", "starts at -1"),
        ({"lower": 5, "upper": 5}, "buffer-lifetime", "upper", "[5, 5) is empty"),
        ({"lower": 5, "upper": 2}, "buffer-lifetime", "upper", "[5, 2) is negative"),
        ({"upper": 2**61}, "buffer-lifetime", "upper", "beyond 2**60"),
        ({"size": -8}, "buffer-size", "size", "size -8 is negative"),
        ({"size": 2**63}, "buffer-size", "size", "beyond 2**60"),
        ({"alignment": 0}, "buffer-alignment", "alignment", "alignment 0 is no power of two"),
        ({"alignment": 48}, "buffer-alignment", "alignment", "alignment 48 is no power of two"),
        ({"alignment": 2**61}, "buffer-alignment", "alignment", "beyond 2**60"),
        ({"gaps": (Gap(2, 2),)}, "buffer-gap", "gaps", "empty, out of order or outside"),
        ({"gaps": (Gap(0, 9),)}, "buffer-gap", "gaps", "outside the lifetime [0, 4)"),
        ({"gaps": (Gap(2, 3), Gap(1, 2))}, "buffer-gap", "gaps", "out of order"),
        ({"gaps": (Gap(1, 2, (4, 9)),)}, "buffer-gap", "gaps", "outside the 8 bytes"),
        ({"offset": -1}, "buffer-offset", "offset", "offset -1 is negative"),
        ({"hint": 2**60}, "buffer-offset", "hint", "ends beyond 2**60"),
        ({"offset": 12, "alignment": 8}, "buffer-offset", "offset", "no multiple of the alignment"),
    ],
)
def test_a_buffer_that_no_plan_could_honour(
    changed: dict[str, object], code: str, field: str, words: str
) -> None:
    fields = {"id": "x", "lower": 0, "upper": 4, "size": 8, **changed}
    with pytest.raises(InputError) as caught:
        Buffer(**fields)  # type: ignore[arg-type]
    assert caught.value.code == code
    assert caught.value.site == field
    assert words in caught.value.message


def _buffer(name: str, alias: str | None = None, size: int = 8, **more: object) -> Buffer:
    return Buffer(name, 0, 4, size, alias=alias, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("buffers", "code", "words"),
    [
        ([_buffer("a"), _buffer("a")], "duplicate-buffer", "two buffers are called 'a'"),
        ([_buffer("a", "b")], "unknown-buffer", "alias of 'b', which is missing"),
        ([_buffer("a", "b"), _buffer("b", "a")], "alias-cycle", "alias of itself"),
        ([_buffer("a"), _buffer("b", "a", 9)], "alias-mismatch", "cannot lie in 'a'"),
        ([_buffer("a", tier="flash")], "unknown-tier", "known are main"),
        ([_buffer("a", size=2**60)], "memory-too-large", "more than 2**60"),
    ],
)
def test_a_problem_that_makes_no_sense(buffers: list[Buffer], code: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        MemoryProblem(tuple(buffers))
    assert caught.value.code == code
    assert words in caught.value.message


def test_tiers_have_names_of_their_own_and_capacities_that_fit() -> None:
    with pytest.raises(InputError, match="two tiers have one name"):
        MemoryProblem((), tiers=(Tier("main"),))
    with pytest.raises(InputError, match="capacity -1 of tier 'main'"):
        MemoryProblem((), capacity=-1)
    problem = MemoryProblem((), capacity=4, tiers=(Tier("flash", 64),))
    assert problem.tier("main").capacity == 4
    assert problem.tier("flash").capacity == 64


def test_aliases_fold_into_one_storage_that_lives_as_long_as_any() -> None:
    problem = MemoryProblem((
        Buffer("base", 0, 3, 64),
        Buffer("view", 2, 6, 16, alignment=8, alias="base"),
        Buffer("later", 8, 9, 16, alias="view", hint=128),
    ))  # fmt: skip
    (storage,) = problem.storages
    assert storage.id == "base"
    assert storage.members == ("base", "view", "later")
    assert (storage.size, storage.alignment, storage.hint) == (64, 8, 128)
    # Between step 6 and step 8 nobody reads it, and the contents stay.
    assert storage.pieces == (Piece(0, 9, 0, 64),)


def test_aliases_may_not_disagree_about_a_fixed_place() -> None:
    base = Buffer("a", 0, 3, 64, offset=0)
    with pytest.raises(InputError, match="fixed at 2 offsets"):
        _ = MemoryProblem((base, Buffer("b", 1, 2, 8, alias="a", offset=8))).storages
    odd = Buffer("a", 0, 3, 64, offset=8)
    with pytest.raises(InputError, match="no multiple of the alignment 16"):
        _ = MemoryProblem((odd, Buffer("b", 1, 2, 8, alignment=16, alias="a"))).storages


def test_gaps_free_what_nobody_uses() -> None:
    gap = Buffer("a", 0, 9, 64, gaps=(Gap(2, 4), Gap(6, 7, (0, 8))))
    (storage,) = MemoryProblem((gap,)).storages
    assert storage.pieces == (Piece(0, 2, 0, 64), Piece(4, 6, 0, 64), Piece(6, 7, 0, 8),
                              Piece(7, 9, 0, 64))  # fmt: skip
    view = Buffer("v", 3, 5, 64, alias="a")
    (shared,) = MemoryProblem((gap, view)).storages
    assert shared.pieces[:2] == (Piece(0, 2, 0, 64), Piece(3, 6, 0, 64))
    (idle,) = MemoryProblem((Buffer("a", 0, 4, 64, gaps=(Gap(0, 4),)),)).storages
    assert (idle.size, idle.pieces) == (0, ())


def test_the_peak_load_is_the_first_of_the_largest_moments() -> None:
    problem = MemoryProblem((
        Buffer("a", 0, 4, 10), Buffer("b", 2, 6, 20), Buffer("c", 4, 8, 10), Buffer("d", 5, 6, 0),
    ))  # fmt: skip
    load = problem.peak_load()
    assert (load.bytes, load.lower, load.upper, load.ids) == (30, 2, 4, ("a", "b"))
    assert MemoryProblem(()).peak_load().bytes == 0


def test_a_plan_is_data() -> None:
    plan = MemoryPlan({"a": 0}, 110, 100, Status.FEASIBLE, "size-first-fit", timed_out=True)
    data = json.loads(json.dumps(plan.to_data()))
    assert data["offsets"] == {"a": 0}
    assert (data["status"], data["gap"], data["timed_out"]) == ("feasible", 0.1, True)
    assert plan.fits
    assert not MemoryPlan({}, 5, 5, Status.INFEASIBLE, "none").fits
    assert MemoryPlan({}, 0, 0, Status.OPTIMAL, "none").gap == 0
