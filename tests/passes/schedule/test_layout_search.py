"""The exact search: its compiled form does what the readable one does, and gluing stays legal."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopt.memory import MemoryProblem
from mopt.passes.schedule import _run
from mopt.passes.schedule._contract import BLOCKS, GUESSES, PAIRS, STACKS, contract, unfold
from mopt.passes.schedule._instance import Instance, make_instance
from mopt.passes.schedule._run import LIMIT, REFUTED, SOLVED, Clock, Guide, Ready
from mopt.passes.schedule._search_twin import Twin
from tests.passes.schedule.problems import cut_rectangle, plain, problems

NODES = 150


def instance_of(problem: MemoryProblem) -> Instance:
    """The storages of a problem that take room."""
    return make_instance([s for s in problem.storages if s.size])


def compiled(
    instance: Instance, capacity: int, guide: Guide, nodes: int = NODES
) -> tuple[int, int, list[int]]:
    """Answer, nodes and offsets of the compiled search, whatever the size."""
    kernel = _run._kernel()
    clock = Clock(60)
    answer, offsets = _run.run(Ready(instance), capacity, guide, nodes, clock)
    assert kernel is _run._kernel()
    return answer, clock.nodes, offsets


def is_legal(instance: Instance, offsets: Sequence[int], capacity: int) -> bool:
    """Brute force over all pairs."""
    items = instance.items
    for i, a in enumerate(items):
        if offsets[i] < 0 or offsets[i] % a.align or a.fixed not in (-1, offsets[i]):
            return False
        if offsets[i] * instance.grain + a.bytes > capacity:
            return False
        for j, b in enumerate(items[:i]):
            meet = any(p < v and u < q for p, q in a.spans for u, v in b.spans)
            above = offsets[i] >= offsets[j] + b.size
            below = offsets[j] >= offsets[i] + a.size
            if meet and not above and not below:
                return False
    return True


@given(problems(most=12), st.integers(0, 6), st.sampled_from([0.0, 0.5, 2.0]), st.randoms())
@settings(max_examples=150)
def test_the_compiled_search_is_its_twin(
    problem: MemoryProblem, more: int, lean: float, random: object
) -> None:
    instance = instance_of(problem)
    capacity = problem.peak_load().bytes + more
    rank = list(range(len(instance.items)))
    random.shuffle(rank)  # type: ignore[attr-defined]
    expected = Twin(instance, capacity, rank, lean).run(NODES)
    assert compiled(instance, capacity, Guide(rank, lean)) == expected
    if expected[0] == SOLVED:
        assert is_legal(instance, expected[2], capacity)


@pytest.mark.parametrize("count", [20, 60])
def test_the_compiled_search_is_its_twin_on_larger_packings(count: int) -> None:
    for seed in range(3):
        instance = instance_of(cut_rectangle(count, seed))
        for lean in (0.0, 1.0):
            rank = sorted(range(count), key=lambda i: -instance.size[i])
            capacity = 256 * 64
            expected = Twin(instance, capacity, rank, lean).run(NODES)
            assert compiled(instance, capacity, Guide(rank, lean)) == expected


def test_limits_are_kept_and_refutations_are_proofs() -> None:
    instance = instance_of(cut_rectangle(120, 2))
    guide = Guide([0] * 120, 0.0)
    assert compiled(instance, 256 * 64, guide, 5)[:2] == (LIMIT, 6)
    assert compiled(instance, 256 * 64 - 1, guide)[0] == REFUTED
    expired = Clock(0)
    assert _run.run(Ready(instance), 256 * 64, guide, 10**9, expired) == (LIMIT, [])
    pair = instance_of(plain([(0, 2, 5), (0, 2, 5)]))
    assert compiled(pair, 9, Guide([0, 1], 0.0))[0] == REFUTED
    assert compiled(pair, 10, Guide([0, 1], 0.0))[0] == SOLVED


@pytest.mark.parametrize("level", [BLOCKS, PAIRS, STACKS, GUESSES])
@given(problems(most=12), st.booleans())
@settings(max_examples=40)
def test_layouts_of_glued_instances_are_layouts(
    level: int, problem: MemoryProblem, fill: bool
) -> None:
    instance = instance_of(problem)
    capacity = problem.peak_load().bytes + 2
    glued = contract(instance, level, instance.room(capacity) if fill else None)
    assert len(glued.items) <= len(instance.items) * 3 + 2
    rank = list(range(len(glued.items)))
    answer, _, found = Twin(glued, capacity, rank, 0.5).run(NODES)
    if answer == SOLVED:
        offsets = unfold(glued, found, len(instance.items))
        assert is_legal(instance, offsets, capacity)


def test_gluing_undoes_the_cuts_of_a_packing() -> None:
    # One block of 4 that is cut in time into 3 + 1 and 2 + 2, below one that is not.
    problem = plain([(0, 2, 3), (0, 2, 1), (2, 4, 2), (2, 4, 2), (0, 4, 4)])
    instance = instance_of(problem)
    assert len(contract(instance, BLOCKS).items) == 2
    assert len(contract(instance, STACKS).items) == 1
