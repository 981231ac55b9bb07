"""From what is kept to an order: values are computed again just before they are first read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

from mopt.errors import InternalError
from mopt.recompute import Again, Item, RecomputeProblem, Replay, replay

# The forward call that makes a value again (second) for a backward call (first).
Way = Callable[[int, int], int | None]


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
    held: Collection[tuple[int, int]] | None = None,
    way: Way | None = None,
) -> Draft:
    """The plan that keeps ``saved``.

    With ``held``, a value survives backward call k only if ``(value, k)`` is in it, and what is
    repeated for one call comes in the order of forward; without, it stays until its last use.
    ``way`` gives the forward call that makes a value again for a backward call. Saved values
    nobody reads are left out.
    """
    items = _items(problem, frozenset(saved), None if held is None else frozenset(held), way)
    used: set[int] = set()
    again: set[int] = set()
    for item in items:
        used.update(s for s in _reads(problem, item) if s not in again)
        if item.repeat:
            again.update(_again(problem, item.index).makes)
    kept = frozenset(saved) & used
    return Draft(kept, items, replay(problem, kept, items))


def _reads(problem: RecomputeProblem, item: Item) -> tuple[int, ...]:
    return _again(problem, item.index).reads if item.repeat else problem.backward[item.index].reads


def _again(problem: RecomputeProblem, index: int) -> Again:
    again = problem.forward[index].again
    assert again is not None
    return again


def _items(
    problem: RecomputeProblem,
    saved: frozenset[int],
    held: frozenset[tuple[int, int]] | None,
    way: Way | None,
) -> tuple[Item, ...]:
    there = set(saved)
    # Forward results outlive the pass, but backward may only rely on what is kept for it.
    items: list[Item] = []
    for index, call in enumerate(problem.backward):
        new: list[Item] = []
        how = partial(way, index) if way else problem.remakes.get
        for s in call.reads:
            if s in problem.maker and s not in there:
                _bring(problem, s, there, new, how)
        if held is not None:
            new.sort(key=lambda item: item.index)
        items += [*new, Item(index)]
        if held is not None:
            there = {s for s in there if (s, index) in held}
    return tuple(items)


def _bring(
    problem: RecomputeProblem,
    wanted: int,
    there: set[int],
    items: list[Item],
    way: Callable[[int], int | None],
) -> None:
    """Repeat what it takes to have a storage, deepest first."""
    stack = [wanted]
    while stack:
        s = stack[-1]
        if s in there:
            stack.pop()
            continue
        index = way(s)
        if index is None:
            raise InternalError(f"storage {s} is neither kept nor repeatable", code="bad-plan")
        again = _again(problem, index)
        missing = [u for u in again.reads if u not in problem.given and u not in there]
        if missing:
            stack.extend(reversed(missing))
            continue
        items.append(Item(index, repeat=True))
        there.update(again.makes)
        stack.pop()


def must_keep(problem: RecomputeProblem) -> frozenset[int]:
    """What no plan can repeat: it is kept wherever backward, or a repetition, reads it."""
    return frozenset(s for s in sources(problem) if s not in problem.ways)


def sources(problem: RecomputeProblem) -> frozenset[int]:
    """Storages that could be worth keeping: needed, or read on the way to something needed."""
    found: set[int] = set()
    stack: list[int] = list(problem.needed)
    while stack:
        s = stack.pop()
        if s in found or s in problem.given:
            continue
        found.add(s)
        for index in problem.ways.get(s, ()):
            stack.extend(_again(problem, index).reads)
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
        ways = problem.ways.get(s, ())
        if not ways:
            kept.add(s)
        for index in ways:
            stack.extend(_again(problem, index).reads)
    return frozenset(kept)
