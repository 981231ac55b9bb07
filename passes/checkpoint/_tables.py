"""A problem in the arrays of the compiled loop, and plans in and out of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mopt.passes.checkpoint._kernel import ITEMS, KEPT, PEAK, PLACE, Arrays, Floats, Ints, measure
from mopt.passes.checkpoint._kernel import prices as _prices
from mopt.passes.checkpoint._order import Draft, must_keep, sources
from mopt.recompute import Call, Item, RecomputeProblem, replay

SAVED = -1


@dataclass(frozen=True)
class Point:
    """A plan as the search sees it: a number and a way a storage (see ``_kernel``); its figures."""

    since: Ints = field(repr=False)
    seconds: float
    peak: int
    kept: int
    place: int

    @property
    def cost(self) -> tuple[float, int]:
        """Repeated seconds first, then the peak."""
        return (self.seconds, self.peak)


class Tables:
    """The arrays of one problem and what may change in its plans.

    ``free`` are the storages that may be kept or not; ``last`` is the backward call of the last
    read of each, chains of repetition included; ``touches`` is how long one replay of the plain
    step is, a measure of the work of the search.
    """

    def __init__(self, problem: RecomputeProblem) -> None:
        self.problem = problem
        self.never = len(problem.backward)
        self.arrays = _arrays(problem)
        self.touches = sum(
            len(c.reads) + len(c.makes) for c in (*problem.forward, *problem.backward)
        )
        inside = sources(problem)
        self.fixed = must_keep(problem) | (problem.results & inside)
        self.sources = inside
        last = _last_reads(problem)
        self.free = np.array(sorted(v for v in inside - self.fixed if v in last), np.int64)
        counts = np.diff(self.arrays.ways_at)
        self.several = np.array([v for v in self.free if counts[v] > 1], np.int64)
        self.last = np.array([last.get(v, 0) for v in range(len(problem.sizes))], np.int64)
        self._items = np.empty(40 * (len(problem.forward) + self.never) + 1000, np.int64)
        self._figures = np.zeros(4, np.int64)
        self._used = np.zeros(len(problem.sizes), np.int64)
        self._none = np.empty(0, np.int64)

    @property
    def items(self) -> Ints:
        """Room for an order of calls."""
        return self._items

    def blank(self, kept: Iterable[int]) -> Ints:
        """The numbers of the plan that keeps ``kept`` and holds repeated values to their end."""
        since = np.concatenate((np.zeros_like(self.arrays.remake), self.arrays.remake))
        since[list({*kept, *self.fixed})] = SAVED
        return since

    def drops(self, since: Ints, values: Sequence[int] | Ints) -> Iterator[Ints]:
        """Plans like ``since`` that give up ``values``: held or not, one value in each way."""
        ways: list[int] = []
        if len(values) == 1:
            v = int(values[0])
            ways = list(self.problem.ways.get(v, ()))
        for way in ways if len(ways) > 1 else (None,):
            for state in (0, self.never):
                found = since.copy()
                found[values] = state
                if way is not None:
                    found[len(self.problem.sizes) + v] = way
                yield found

    def point(self, since: Ints) -> Point | None:
        """The figures of a plan; None where its order would grow beyond all reason."""
        seconds = float(
            measure(
                self.arrays, since, self._items, self._figures, self._used, -1, self._none
            )
        )  # fmt: skip
        if seconds < 0:
            return None
        figures = self._figures
        return Point(
            since.copy(), seconds, int(figures[PEAK]), int(figures[KEPT]), int(figures[PLACE])
        )

    def alive(self, point: Point) -> Ints:
        """Storages alive where the plan's peak is, of those that may change."""
        live = np.zeros(len(self.problem.sizes), np.int64)
        measure(
            self.arrays, point.since, self._items, self._figures, self._used, point.place, live
        )  # fmt: skip
        found: Ints = self.free[live[self.free] == 1]
        return found

    def backward_call(self, point: Point) -> int:
        """The backward call that the plan's peak is at or comes before; -1: it is in forward.

        ``point`` is the plan that was measured last.
        """
        place = point.place - len(self.problem.forward)
        if place < 0:
            return -1
        rest = self._items[place : self._figures[ITEMS]]
        return int(rest[np.argmax(rest >= 0)])

    def prices(self, since: Ints, wanted: Ints) -> Floats:
        """Seconds to have each value again under a plan."""
        out = np.zeros(len(wanted))
        _prices(self.arrays, since, wanted, out)
        return out

    def draft(self, point: Point) -> Draft:
        """The complete plan with the replay that counts."""
        measure(
            self.arrays, point.since, self._items, self._figures, self._used, -1, self._none
        )  # fmt: skip
        items = tuple(
            Item(int(k)) if k >= 0 else Item(int(-1 - k), repeat=True)
            for k in self._items[: self._figures[ITEMS]]
        )
        kept = frozenset(np.flatnonzero(self._used).tolist())
        return Draft(kept, items, replay(self.problem, kept, items))


def _flat(lists: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    starts = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(one) for one in lists], out=starts[1:])
    return np.array([v for one in lists for v in one], np.int64), starts


def _arrays(problem: RecomputeProblem) -> Arrays:
    count = len(problem.sizes)
    sizes = np.array(problem.sizes, np.int64)
    remake = np.full(count, -2, np.int64)
    remake[list(problem.maker)] = -1
    for s, index in problem.remakes.items():
        remake[s] = index
    ways, ways_at = _flat([problem.ways.get(s, ()) for s in range(count)])
    stays = np.zeros(count, np.int64)
    stays[[s for s in problem.results if s in problem.maker]] = 1
    result = np.zeros(count, np.int64)
    result[list(problem.results)] = 1
    # A given storage is there whatever happens: nobody has to make it or counts its bytes.
    given = list(problem.given)
    remake[given] = -2
    again = [call.again for call in problem.forward]
    reads, reads_at = _flat([[u for u in a.reads if u not in problem.given] if a else []
                             for a in again])  # fmt: skip
    makes, makes_at = _flat([list(a.makes) if a else [] for a in again])
    b_reads, b_reads_at = _flat(
        [[u for u in c.reads if u not in problem.given] for c in problem.backward]
    )
    b_makes, b_makes_at = _flat([list(c.makes) for c in problem.backward])
    ends, plain = _forward(problem, stays)
    return Arrays(
        sizes, remake, ways, ways_at, stays, ends, plain, reads, reads_at, makes, makes_at,
        np.array([a.workspace if a else 0 for a in again], np.int64),
        np.array([a.seconds if a else 0.0 for a in again], np.float64),
        b_reads, b_reads_at, b_makes, b_makes_at,
        np.array([c.workspace for c in problem.backward], np.int64), result, problem.constant,
    )  # fmt: skip


def _forward(problem: RecomputeProblem, stays: Ints) -> tuple[Ints, Ints]:
    calls: tuple[Call, ...] = problem.forward
    ends = np.full(len(problem.sizes), len(calls), np.int64)
    for index, call in enumerate(calls):
        for s in (*call.reads, *call.makes):
            ends[s] = index
    live, total = [], problem.constant
    for index, call in enumerate(calls):
        total += sum(problem.sizes[s] for s in call.makes)
        live.append(total + call.workspace)
        for s in {*call.reads, *call.makes}:
            if s in problem.maker and ends[s] == index and not stays[s]:
                total -= problem.sizes[s]
    return ends, np.array(live, np.int64)


def _last_reads(problem: RecomputeProblem) -> dict[int, int]:
    """The last backward call that reads a storage, or reads what is repeated from it."""
    last: dict[int, int] = {}
    for index, call in enumerate(problem.backward):
        for s in call.reads:
            last[s] = index
    for call in reversed(problem.forward):
        if call.again is None:
            continue
        ends = [last[s] for s in call.again.makes if s in last]
        if ends:
            for u in call.again.reads:
                last[u] = max(last.get(u, 0), *ends)
    return last
