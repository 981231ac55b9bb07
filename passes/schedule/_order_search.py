"""The least peak of a stretch of operators, by search over sets of finished ones.

What is alive depends only on which operators have run, so a state is such a set (a down-set of
the graph), and the least peak to reach the full set is a bottleneck shortest path: states are
taken up in the order of their peak, deeper ones first, until the full one is reached.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mopt.passes.schedule._order_problem import Run

STATES = 100_000


@dataclass(frozen=True)
class Found:
    """An order of the operators asked for; ``is_least`` says that no order has a lower peak."""

    order: list[int]
    peak: int
    is_least: bool


def search(
    run: Run,
    stretch: Sequence[int],
    floor: int,
    *,
    states: int = STATES,
    deadline: float | None = None,
) -> Found | None:
    """The best order of ``stretch`` from the state ``run``, None where it did not finish.

    Peaks below ``floor`` (bytes) are as good as ``floor``. Gives up after ``states`` sets or at
    ``deadline`` (``time.monotonic``).
    """
    return _Search(run, stretch, floor).solve(states, deadline)


class _Search:
    """States are bit sets over the stretch; costs are computed from counts of what has run."""

    def __init__(self, run: Run, stretch: Sequence[int], floor: int) -> None:
        problem = run.problem
        self.stretch = sorted(stretch)
        self.floor = floor
        place = {v: i for i, v in enumerate(self.stretch)}
        self.live = run.live
        self.full = (1 << len(self.stretch)) - 1
        self.before = [
            sum(1 << place[u] for u in set(problem.before[v]) if u in place) for v in self.stretch
        ]
        self.after = [
            sorted({place[w] for w in problem.after[v] if w in place}) for v in self.stretch
        ]
        # A storage ends in the stretch when those of its touchers that are left are all in it.
        self.ends: dict[int, int] = {}
        for s in {s for v in self.stretch for s in problem.touches[v]} - problem.kept:
            inside = [place[w] for w in problem.touchers[s] if w in place]
            if run.left[s] == len(inside):
                self.ends[s] = sum(1 << i for i in inside)
        self.made = [sum(problem.sizes[s] for s in problem.makes[v]) for v in self.stretch]
        self.needs = [problem.needs(v) for v in self.stretch]
        self.own = [
            [(self.ends[s], problem.sizes[s]) for s in problem.touches[v] if s in self.ends]
            for v in self.stretch
        ]
        self.takes = [
            [(self.ends[s], problem.sizes[s]) for s in problem.may_take(v) if s in self.ends]
            for v in self.stretch
        ]

    def cost(self, state: int, i: int) -> tuple[int, int]:
        with_it = state | (1 << i)
        made = self.made[i]
        freed = taken = 0
        for users, size in self.own[i]:
            if users & ~with_it == 0:
                freed += size
        for users, size in self.takes[i]:
            if users & ~with_it == 0:
                taken = size
                break
        return made - taken + self.needs[i], made - freed

    def solve(self, states: int, deadline: float | None) -> Found | None:
        ready = tuple(i for i, need in enumerate(self.before) if not need)
        first = self._run_free(0, (), self.live, ready, self.floor)
        # What led to a state: the state before and the operators run since.
        origin = {first[0]: (-1, first[1])}
        best = {first[0]: self.floor}
        heap = [(self.floor, len(self.stretch) - len(first[1]), *first)]
        closed: set[int] = set()
        while heap:
            peak, left, state, _, live, ready = heapq.heappop(heap)
            if state == self.full:
                return Found(self._trail(origin), peak, True)
            if state in closed:
                continue
            closed.add(state)
            if len(closed) > states or (
                deadline is not None and len(closed) % 256 == 0 and time.monotonic() > deadline
            ):
                return None
            for i in ready:
                during, after = self.cost(state, i)
                top = max(peak, live + during)
                woken = self._woken(state, ready, i)
                new = self._run_free(state | (1 << i), (i,), live + after, woken, top)
                if best.get(new[0], top + 1) > top:
                    best[new[0]] = top
                    origin[new[0]] = (state, new[1])
                    heapq.heappush(heap, (top, left - len(new[1]), *new))
        return None

    def _woken(self, state: int, ready: tuple[int, ...], i: int) -> tuple[int, ...]:
        """The ready operators once ``i`` has run, too."""
        state |= 1 << i
        rest = [k for k in ready if k != i]
        rest += [k for k in self.after[i] if not self.before[k] & ~state]
        return tuple(sorted(rest))

    def _run_free(
        self, state: int, moves: tuple[int, ...], live: int, ready: tuple[int, ...], peak: int
    ) -> tuple[int, tuple[int, ...], int, tuple[int, ...]]:
        """Run at once what neither raises the peak nor leaves more alive.

        Nothing is lost by that: later such an operator frees at least as much, and what runs after
        it finds at most as much alive, and at least the storages it could take.
        """
        k = 0
        while k < len(ready):
            during, after = self.cost(state, ready[k])
            if after <= 0 and live + during <= peak:
                i = ready[k]
                ready = self._woken(state, ready, i)
                state |= 1 << i
                live += after
                moves = (*moves, i)
                k = 0
            else:
                k += 1
        return state, moves, live, ready

    def _trail(self, origin: dict[int, tuple[int, tuple[int, ...]]]) -> list[int]:
        order: list[int] = []
        state = self.full
        while state >= 0:
            state, moves = origin[state]
            order[:0] = moves
        return [self.stretch[i] for i in order]
