"""A training step as a chain of blocks, each with a list of ways to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mopt.passes.checkpoint._order import closed
from mopt.passes.checkpoint._search import descend, polish
from mopt.passes.checkpoint._tables import SAVED, Point, Tables
from mopt.recompute import Call, RecomputeProblem

_OPTIONS = 20


@dataclass(frozen=True)
class Option:
    """One way to run a block: bytes kept between its passes, peaks of both, seconds repeated.

    ``since`` is the plan inside the block, by the block's own numbering of storages, ``ways`` the
    block's call that makes each one again.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    seconds: float
    since: dict[int, int]
    ways: dict[int, int]


@dataclass(frozen=True)
class Block:
    """Calls ``begin`` to ``end`` of forward, and ``first`` to ``last`` of backward.

    ``crosses`` are the storages made so far that later blocks read. ``arrives`` are the bytes of
    gradients that its backward finds, ``results`` those of results that are there before it.
    """

    begin: int
    end: int
    first: int
    last: int
    crosses: tuple[int, ...]
    crossing: int
    seconds: float
    arrives: int
    results: int
    local: RecomputeProblem
    names: tuple[int, ...]
    options: tuple[Option, ...] = ()


def cut(problem: RecomputeProblem, most: int) -> list[Block]:
    """The blocks of a problem, in the order of forward; at most ``most``.

    A cut lies where a single large storage is read by what follows. What is read over more than a
    quarter of the pass (masks, long skips) does not count: it is left to the block that makes it.
    """
    calls = problem.forward
    reads = {s: i for i, call in enumerate(calls) for s in call.reads}
    long_lived = {
        s for s, last in reads.items()
        if s in problem.maker and last - problem.maker[s] > max(8, len(calls) // 4)
    }  # fmt: skip
    largest = max((problem.sizes[s] for s in problem.maker), default=0)
    alive: set[int] = set()
    places: list[tuple[int, tuple[int, ...]]] = []
    for index, call in enumerate(calls[:-1]):
        alive |= {s for s in call.makes if reads.get(s, -1) > index}
        alive = {s for s in alive if reads[s] > index}
        crossing = [s for s in alive if s not in long_lived]
        # A value's smaller forms stay in its block.
        inside = calls[index + 1].form
        if not inside and sum(problem.sizes[s] * 64 > largest for s in crossing) <= 1:
            places.append((index + 1, tuple(sorted(crossing))))
    width = -(-(len(places) + 1) // most)
    places = places[width - 1 :: width]
    return _with_backward(problem, places)


def _with_backward(
    problem: RecomputeProblem, places: Sequence[tuple[int, tuple[int, ...]]]
) -> list[Block]:
    bounds = [0, *(p for p, _ in places), len(problem.forward)]
    block_of = {}
    for number, (begin, end) in enumerate(pairwise(bounds)):
        for call in problem.forward[begin:end]:
            block_of.update(dict.fromkeys(call.makes, number))
    outside = set(problem.results)
    for number, (begin, end) in enumerate(pairwise(bounds)):
        for call in problem.forward[begin:end]:
            outside.update(s for s in call.reads if block_of.get(s, number) != number)
    count = len(bounds) - 1
    # Backward of a block begins with the first call that reads what only this block makes.
    starts = [len(problem.backward)] * count
    for index, call in enumerate(problem.backward):
        for s in call.reads:
            if s in block_of and s not in outside:
                starts[block_of[s]] = min(starts[block_of[s]], index)
    starts[-1] = 0
    for number in range(1, count):
        starts[number] = min(starts[number], starts[number - 1])
    made: list[Block] = []
    for number in range(count):
        made.append(_block(
            problem, bounds[number], bounds[number + 1], starts[number],
            starts[number - 1] if number else len(problem.backward),
            places[number][1] if number < count - 1 else (),
        ))  # fmt: skip
    return made


def _block(
    problem: RecomputeProblem,
    begin: int,
    end: int,
    first: int,
    last: int,
    crosses: tuple[int, ...],
) -> Block:
    forward, backward = problem.forward[begin:end], problem.backward[first:last]
    own = {s for call in (*forward, *backward) for s in call.makes}
    names = tuple(dict.fromkeys(
        s for call in (*forward, *backward)
        for s in (*call.reads, *call.makes, *(call.again.reads if call.again else ()))
    ))  # fmt: skip
    number = {s: i for i, s in enumerate(names)}
    before = {s for call in problem.backward[:first] for s in call.makes}
    later = {s for call in problem.backward[last:] for s in call.reads}
    arrives = sum(
        problem.sizes[s] for s in names
        if s in before and s not in problem.results and s not in own
    )  # fmt: skip
    results = {s for s in own if s in problem.results}
    local = RecomputeProblem(
        tuple(problem.sizes[s] for s in names),
        tuple(_renamed(call, number) for call in forward),
        tuple(_renamed(call, number) for call in backward),
        frozenset(number[s] for s in names if s not in own),
        frozenset(
            number[s] for s in own if s in results or (s in later and s not in problem.maker)
        ),
    )  # fmt: skip
    held = sum(problem.sizes[s] for s in problem.results if s in before or s in problem.maker)
    return Block(
        begin, end, first, last, crosses, sum(problem.sizes[s] for s in crosses),
        sum(call.seconds for call in forward), arrives, held, local, names,
    )  # fmt: skip


def _renamed(call: Call, number: dict[int, int]) -> Call:
    again = call.again
    if again is not None:
        again = replace(
            again, reads=tuple(number[s] for s in again.reads),
            makes=tuple(number[s] for s in again.makes),
        )  # fmt: skip
    return replace(
        call, name="", layer="", reads=tuple(number[s] for s in call.reads),
        makes=tuple(number[s] for s in call.makes), again=again,
    )  # fmt: skip


def with_options(blocks: Sequence[Block], work: int) -> tuple[list[Block], int]:
    """The blocks with their ways to run, and how many different blocks there are.

    Equal blocks are solved once.
    """
    known: dict[tuple[RecomputeProblem, frozenset[int]], tuple[Option, ...]] = {}
    keys = [(b.local, frozenset(b.names.index(s) for s in b.crosses if s in b.names))
            for b in blocks]  # fmt: skip
    different = len(set(keys))
    found = []
    for block, key in zip(blocks, keys, strict=True):
        if key not in known:
            known[key] = _options(*key, work // different)
        found.append(replace(block, options=known[key]))
    return found, different


def _options(local: RecomputeProblem, out: frozenset[int], work: int) -> tuple[Option, ...]:
    """Ways to run a block that leaves ``out`` behind, which all of them keep."""
    tables = Tables(local)
    tables.fixed |= out & tables.sources
    tables.free = np.array([v for v in tables.free if v not in out], np.int64)
    tables.several = np.array([v for v in tables.several if v not in out], np.int64)
    points = descend(tables, work // 4, kept=True) + descend(tables, work // 4)
    for one in list(points):
        points.append(polish(tables, one, one.peak, work // (4 * len(points))))
    least: list[Option] = []
    for point in sorted(points, key=lambda p: (p.seconds, p.kept, p.peak)):
        option = _option(tables, point, out)
        if not any(
            o.kept <= option.kept and o.backward_peak <= option.backward_peak
            and o.forward_peak <= option.forward_peak for o in least
        ):  # fmt: skip
            least.append(option)
    if len(least) > _OPTIONS:
        # Spread over the kept bytes, the two ends included.
        least.sort(key=lambda o: o.kept)
        step = (len(least) - 1) / (_OPTIONS - 1)
        least = [least[round(i * step)] for i in range(_OPTIONS)]
    return tuple(least)


def _option(tables: Tables, point: Point, out: frozenset[int]) -> Option:
    local = tables.problem
    draft = tables.draft(point)
    saved = closed(local, draft.saved)
    since = {
        v: SAVED if v in saved else int(point.since[v]) for v in local.maker if v not in local.given
    }
    figures = draft.figures
    own = sum(local.sizes[v] for v in draft.saved if v not in out)
    return Option(
        own, figures.forward_peak, figures.backward_peak,
        figures.repeated_seconds, since,
        {v: int(point.since[len(local.sizes) + v]) for v in since},
    )  # fmt: skip
