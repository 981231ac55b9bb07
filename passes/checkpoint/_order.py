"""From what is kept to an order: values are computed again just before they are first read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from mopt.errors import InternalError
from mopt.recompute import Item, RecomputeProblem, Replay, replay


@dataclass(frozen=True)
class Stages:
    """Backward calls in consecutive groups: ``ends[k]`` is one past the last call of stage k.

    A stage is one call, unless that gave more than ``most`` stages; then a stage begins with a call
    that reads what may be repeated, and if these are too many as well, neighbours are joined.
    """

    ends: tuple[int, ...]

    @staticmethod
    def of(problem: RecomputeProblem, most: int) -> Stages:
        """The stages of a problem."""
        starts = list(range(len(problem.backward)))
        if len(starts) > most:
            starts = [
                i for i in starts if any(s in problem.remakes for s in problem.backward[i].reads)
            ]  # fmt: skip
        width = max(1, -(-len(starts) // most))
        ends = [*starts[width::width], len(problem.backward)]
        return Stages(tuple(ends))

    @cached_property
    def stage_of(self) -> tuple[int, ...]:
        """The stage of each backward call."""
        found: list[int] = []
        for k, end in enumerate(self.ends):
            found.extend([k] * (end - len(found)))
        return tuple(found)


@dataclass(frozen=True)
class Draft:
    """A complete plan with its replay."""

    saved: frozenset[int]
    items: tuple[Item, ...]
    figures: Replay

    @property
    def cost(self) -> tuple[float, int]:
        """Repeated seconds first, then the peak."""
        return (self.figures.repeated_seconds, self.figures.peak)


def draft(
    problem: RecomputeProblem,
    saved: Collection[int],
    stages: Stages | None = None,
    held: Collection[tuple[int, int]] = (),
) -> Draft:
    """The plan that keeps ``saved``.

    With ``stages``, a repeated value survives the end of stage k only if ``(value, k)`` is in
    ``held``; without, it stays until its last use. Saved values nobody reads are left out.
    """
    items = _items(problem, frozenset(saved), stages, frozenset(held))
    used = {s for item in items for s in _reads(problem, item)}
    kept = frozenset(saved) & used
    return Draft(kept, items, replay(problem, kept, items))


def _reads(problem: RecomputeProblem, item: Item) -> tuple[int, ...]:
    if not item.repeat:
        return problem.backward[item.index].reads
    again = problem.forward[item.index].again
    assert again is not None
    return again.reads


def _items(
    problem: RecomputeProblem,
    saved: frozenset[int],
    stages: Stages | None,
    held: frozenset[tuple[int, int]],
) -> tuple[Item, ...]:
    there = set(saved)
    # Forward results outlive the pass, but backward may only rely on what is kept for it.
    items: list[Item] = []
    for index, call in enumerate(problem.backward):
        for s in call.reads:
            if s in problem.maker and s not in there:
                _bring(problem, s, there, items)
        items.append(Item(index))
        if stages is not None:
            k = stages.stage_of[index]
            if index + 1 == stages.ends[k]:
                there = {s for s in there if s in saved or (s, k) in held}
    return tuple(items)


def _bring(problem: RecomputeProblem, wanted: int, there: set[int], items: list[Item]) -> None:
    """Repeat what it takes to have a storage, deepest first."""
    stack = [wanted]
    while stack:
        s = stack[-1]
        if s in there:
            stack.pop()
            continue
        index = problem.remakes.get(s)
        if index is None:
            raise InternalError(f"storage {s} is neither kept nor repeatable", code="bad-plan")
        again = problem.forward[index].again
        assert again is not None
        missing = [u for u in again.reads if u not in problem.given and u not in there]
        if missing:
            stack.extend(reversed(missing))
            continue
        items.append(Item(index, repeat=True))
        there.update(again.makes)
        stack.pop()


def must_keep(problem: RecomputeProblem) -> frozenset[int]:
    """What every plan keeps: read by backward, or by any repetition, and not repeatable itself."""
    fixed: set[int] = set()
    stack = list(problem.needed)
    seen: set[int] = set()
    while stack:
        s = stack.pop()
        if s in seen:
            continue
        seen.add(s)
        if s not in problem.remakes:
            fixed.add(s)
    return frozenset(fixed)


def sources(problem: RecomputeProblem) -> frozenset[int]:
    """Storages that could be worth keeping: needed, or read on the way to something needed."""
    found: set[int] = set()
    stack: list[int] = list(problem.needed)
    while stack:
        s = stack.pop()
        if s in found or s in problem.given:
            continue
        found.add(s)
        index = problem.remakes.get(s)
        if index is not None:
            again = problem.forward[index].again
            assert again is not None
            stack.extend(again.reads)
    return frozenset(found)


def closed(problem: RecomputeProblem, saved: Iterable[int]) -> frozenset[int]:
    """``saved`` with what cannot be repeated but is needed to repeat the rest."""
    kept = set(saved)
    seen: set[int] = set()
    stack = list(problem.needed)
    while stack:
        s = stack.pop()
        if s in kept or s in problem.given or s in seen:
            continue
        seen.add(s)
        index = problem.remakes.get(s)
        if index is None:
            kept.add(s)
            continue
        again = problem.forward[index].again
        assert again is not None
        stack.extend(again.reads)
    return frozenset(kept)
