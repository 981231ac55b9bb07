"""The problem of ordering calls for the least memory, and what an order costs.

An operator makes storages, touches them and others, and may need a workspace while it runs. A
storage lives from the call that makes it to the last one that touches it. The peak is counted as
memory-planning sheets do: what is alive before, plus what the call makes, plus its workspace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# Storages of a chain that the bound looks along.
_LONGEST = 8


@dataclass(frozen=True)
class OrderProblem:
    """Operators ``0..n-1`` in their present order.

    ``before[v]`` must run earlier than ``v``. ``makes[v]`` and ``touches[v]`` are storages
    (``makes`` is part of ``touches``), ``sizes`` their bytes, ``kept`` those alive until the end.
    ``takes[v]`` are storages whose memory the one storage that ``v`` makes may take over if ``v``
    is the last to touch them. ``given`` are storages that are there from the start.
    """

    before: tuple[tuple[int, ...], ...]
    makes: tuple[tuple[int, ...], ...]
    touches: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    kept: frozenset[int] = frozenset()
    workspace: tuple[int, ...] = ()
    takes: tuple[tuple[int, ...], ...] = ()
    given: frozenset[int] = frozenset()

    @property
    def count(self) -> int:
        """How many operators there are."""
        return len(self.before)

    @cached_property
    def after(self) -> tuple[tuple[int, ...], ...]:
        """For each operator those that must run later than it, directly."""
        found: list[list[int]] = [[] for _ in self.before]
        for v, earlier in enumerate(self.before):
            for u in earlier:
                found[u].append(v)
        return tuple(map(tuple, found))

    @cached_property
    def touchers(self) -> tuple[tuple[int, ...], ...]:
        """For each storage the operators that touch it."""
        found: list[list[int]] = [[] for _ in self.sizes]
        for v, touched in enumerate(self.touches):
            for s in touched:
                found[s].append(v)
        return tuple(map(tuple, found))

    def needs(self, v: int) -> int:
        """The workspace of an operator."""
        return self.workspace[v] if self.workspace else 0

    def may_take(self, v: int) -> tuple[int, ...]:
        """The storages an operator may reuse for its result."""
        return self.takes[v] if self.takes else ()


class Run:
    """Operators run one after another: bytes alive, and what each next one would cost."""

    def __init__(self, problem: OrderProblem) -> None:
        self.problem = problem
        self.left = [len(touchers) for touchers in problem.touchers]
        self.live = self.peak = sum(problem.sizes[s] for s in problem.given)

    def cost(self, v: int) -> tuple[int, int]:
        """Bytes above the present ones while ``v`` runs, and after it has run."""
        problem = self.problem
        made = sum(problem.sizes[s] for s in problem.makes[v])
        freed = sum(
            problem.sizes[s] for s in problem.touches[v]
            if self.left[s] == 1 and s not in problem.kept
        )  # fmt: skip
        return made - self.taken(v) + problem.needs(v), made - freed

    def taken(self, v: int) -> int:
        """Bytes of the storage that the result of ``v`` takes over, 0 if none."""
        s = self.taken_storage(v)
        return 0 if s is None else self.problem.sizes[s]

    def taken_storage(self, v: int) -> int | None:
        """The storage whose memory the result of ``v`` takes over now, if there is one."""
        problem = self.problem
        for s in problem.may_take(v):
            if self.left[s] == 1 and s not in problem.kept:
                return s
        return None

    def copy(self) -> Run:
        """The same state, to go on from independently."""
        new = Run.__new__(Run)
        new.problem, new.left = self.problem, list(self.left)
        new.live, new.peak = self.live, self.peak
        return new

    def run(self, v: int) -> None:
        """Run ``v`` now."""
        during, after = self.cost(v)
        self.peak = max(self.peak, self.live + during)
        self.live += after
        for s in self.problem.touches[v]:
            self.left[s] -= 1


def peak_of(problem: OrderProblem, order: Sequence[int]) -> tuple[int, int]:
    """The peak of an order in bytes, and the position where it is reached first."""
    run, at = Run(problem), 0
    for position, v in enumerate(order):
        before = run.peak
        run.run(v)
        if run.peak > before:
            at = position
    return run.peak, at


def is_order(problem: OrderProblem, order: Sequence[int]) -> bool:
    """Whether an order runs every operator once, none before what it needs."""
    place = {v: i for i, v in enumerate(order)}
    return sorted(order) == list(range(problem.count)) and all(
        place[u] < place[v] for v, earlier in enumerate(problem.before) for u in earlier
    )


def ancestors(problem: OrderProblem) -> list[int]:
    """For each operator a bit set of those that must run before it."""
    found: list[int] = []
    for earlier in problem.before:
        bits = 0
        for u in earlier:
            bits |= found[u] | (1 << u)
        found.append(bits)
    return found


def descendants(problem: OrderProblem) -> list[int]:
    """For each operator a bit set of those that must run after it."""
    found = [0] * problem.count
    for v in range(problem.count - 1, -1, -1):
        for u in problem.before[v]:
            found[u] |= found[v] | (1 << v)
    return found


def forced_bound(problem: OrderProblem) -> int:
    """Bytes that some operator sees alive in every order: no order has a lower peak.

    Whatever runs last sees all that is kept. For the rest see :func:`forced_live`.
    """
    return max(int(forced_live(problem)[0].max(initial=0)), _bound_at_end(problem))


def forced_live(
    problem: OrderProblem, longest: int = _LONGEST
) -> tuple[NDArray[np.int64], dict[int, int]]:
    """For each operator the bytes it sees alive in every order; for each storage the operators,
    as a bit set, for which it was counted.

    A storage is alive while ``v`` runs, whatever the order, if its maker is ``v`` or must run
    before it, and one of its touchers is ``v`` or must run after it. Where an operator that may run
    before or after ``v`` turns a storage made before it into one touched after it, perhaps through
    others, one of them is alive: the smallest counts. ``longest`` storages in a row are looked at.
    """
    count = problem.count
    earlier, later = ancestors(problem), descendants(problem)
    total = np.array([problem.needs(v) for v in range(count)], np.int64)
    for v in range(count):
        total[v] -= max((problem.sizes[s] for s in problem.may_take(v)), default=0)
    makers = {s: v for v, made in enumerate(problem.makes) for s in made}
    everywhere = (1 << count) - 1
    made: dict[int, int] = {}
    needed: dict[int, int] = {}
    for s in (*makers, *problem.given):
        until = 0
        for v in problem.touchers[s]:
            until |= earlier[v] | (1 << v)
        maker = makers.get(s)
        made[s] = everywhere if maker is None else later[maker] | (1 << maker)
        needed[s] = everywhere if s in problem.kept else until
        total += problem.sizes[s] * _positions(made[s] & needed[s], count)
    # Every storage counts once for an operator: what it has counted for so far.
    counted = {s: made[s] & needed[s] for s in made}
    for s in made:
        for chain, alive in _chains(problem, s, made[s], needed, counted, longest):
            total += min(problem.sizes[link] for link in chain) * _positions(alive, count)
    return total, counted


def _bound_at_end(problem: OrderProblem) -> int:
    """What is kept until the end, and what the operator that runs last needs besides."""
    kept = sum(problem.sizes[s] for s in problem.kept)
    last = [
        sum(problem.sizes[s] for s in problem.touches[v] if s not in problem.kept)
        + problem.needs(v)
        - max((problem.sizes[s] for s in problem.may_take(v)), default=0)
        for v in range(problem.count) if not problem.after[v]
    ]  # fmt: skip
    return kept + max(min(last, default=0), 0)


def _chains(
    problem: OrderProblem,
    first: int,
    made: int,
    needed: Mapping[int, int],
    counted: dict[int, int],
    longest: int,
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Storages each made from the one before, and the operators that see one of them alive.

    These run after the first is made and before the last is touched last, in every order; whoever
    has run of the operators between, the result of the last of these is alive.
    """
    if longest < 2:
        return
    stack: list[tuple[tuple[int, ...], int]] = [((first,), made & ~counted[first])]
    while stack:
        chain, open_to = stack.pop()
        for w in problem.touchers[chain[-1]]:
            if chain[-1] in problem.makes[w]:
                continue
            for result in problem.makes[w]:
                open_here = open_to & ~counted[result]
                for link in chain:
                    open_here &= ~counted[link]
                if not open_here or not problem.sizes[result]:
                    continue
                longer = (*chain, result)
                alive = open_here & needed[result]
                if alive:
                    yield longer, alive
                    for link in longer:
                        counted[link] |= alive
                    open_here &= ~alive
                if open_here and len(longer) < longest:
                    stack.append((longer, open_here))


def _positions(bits: int, count: int) -> NDArray[np.int64]:
    """A bit set as zeros and ones."""
    raw = np.frombuffer(bits.to_bytes(count // 8 + 1, "little"), np.uint8)
    return np.unpackbits(raw, bitorder="little", count=count).astype(np.int64)
