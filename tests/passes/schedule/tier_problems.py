"""Random problems of two memories, and their least cost by walking through every possible run."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import chain, combinations, count

from hypothesis import strategies as st

from mopt.tiers import TierProblem, TierStep, TierValue

_State = tuple[frozenset[str], frozenset[str], frozenset[str]]


@st.composite
def tier_problems(draw: st.DrawFn, most: int = 5, *, pieces: int = 1) -> TierProblem:
    """A few steps in a room that is too small for all of their values, but large enough for one."""
    sizes = st.integers(0, 6).map(lambda n: n * 4)
    values = [TierValue(f"in{n}", draw(sizes), given=True) for n in range(draw(st.integers(0, 2)))]
    steps: list[TierStep] = []
    for n in range(draw(st.integers(1, most))):
        made = [TierValue(f"v{n}", draw(sizes), kept=draw(st.booleans()))]
        if draw(st.integers(0, 3)) == 0:
            made.append(TierValue(f"w{n}", draw(sizes)))
        names = [v.id for v in values]
        few = st.lists(st.sampled_from(names), max_size=2, unique=True) if names else st.just([])
        reads = draw(few)
        owner = {name: s for s in steps for name in s.makes}
        changed = {name: s.id for s in steps for name in s.writes}
        before = {owner[name].id for name in reads if name in owner}
        before |= {changed[name] for name in reads if name in changed}
        writes = []
        if reads and draw(st.integers(0, 5)) == 0:
            # Whoever reads the value before it changes runs earlier.
            writes = reads[:1]
            before |= {s.id for s in steps if writes[0] in s.touches}
        alike = [v.id for v in values if v.id in reads and not v.given and v.bytes == made[0].bytes]
        takes = tuple(alike) if len(made) == 1 and not writes and draw(st.booleans()) else ()
        pair = tuple(reads) if len(reads) == 2 and draw(st.booleans()) else ()
        steps.append(TierStep(
            f"s{n}", tuple(r for r in reads if r not in writes), tuple(v.id for v in made),
            tuple(writes), tuple(sorted(before)), takes, (pair,) if pair else (),
            workspace=draw(st.sampled_from([0, 0, 4])), seconds=draw(st.integers(0, 3)) * 1.0,
        ))  # fmt: skip
        values += made
    window = draw(st.sampled_from([0, 4]))
    roomy = TierProblem(tuple(steps), tuple(values), 10**6, window, 4, pieces)
    room = max(roomy.least_bytes(step) for step in steps) + draw(st.integers(0, 12)) * 4
    return TierProblem(tuple(steps), tuple(values), room, window, 4, pieces)


def least_extra_bytes(problem: TierProblem) -> int:
    """The fewest bytes beyond the compulsory ones, over all orders and residencies of whole values.

    Room is counted in bytes, so that a layout may still not exist.
    """
    start: _State = (frozenset(), frozenset(), frozenset(v.id for v in problem.values if v.given))
    number = count()
    heap = [(0, next(number), start)]
    best = {start: 0}
    while True:
        cost, _, state = heapq.heappop(heap)
        if cost > best[state]:
            continue
        if len(state[0]) == len(problem.steps):
            return cost - problem.compulsory_bytes
        for price, following in _moves(problem, state):
            total = cost + price
            if total < best.get(following, total + 1):
                best[following] = total
                heapq.heappush(heap, (total, next(number), following))


def _moves(problem: TierProblem, state: _State) -> Iterator[tuple[int, _State]]:
    done, fast, _ = state
    for step in problem.steps:
        if step.id in done or not done.issuperset(step.before):
            continue
        for kept in _subsets(fast | set(step.touches)):
            if _room(problem, done, step, kept) <= problem.fast_bytes and all(
                kept & set(group) for group in step.one_of
            ):
                yield _run(problem, state, step, kept)


def _room(problem: TierProblem, done: frozenset[str], step: TierStep, kept: frozenset[str]) -> int:
    used = step.workspace + sum(problem.value[name].bytes for name in kept)
    used += sum(problem.window(name) for name in step.touches if name not in kept)
    if step.makes[0] in kept and any(
        name in kept and _is_dead(problem, done | {step.id}, name) for name in step.takes
    ):
        used -= problem.value[step.makes[0]].bytes
    return used


def _run(
    problem: TierProblem, state: _State, step: TierStep, kept: frozenset[str]
) -> tuple[int, _State]:
    done, fast, slow = state
    after = done | {step.id}
    price, valid = 0, set(slow)
    for name in fast - kept:
        if name not in valid:
            price += problem.value[name].bytes
            valid.add(name)
    for name in step.touches:
        size = problem.value[name].bytes
        price += size if name not in step.makes and not (name in fast and name in kept) else 0
        if name in step.makes or name in step.writes:
            valid.discard(name)
            if name not in kept:
                price += size
                valid.add(name)
    dead = {name for name in valid | kept if _is_dead(problem, after, name)}
    if len(after) == len(problem.steps):
        price += sum(v.bytes for v in problem.values if v.kept and v.id not in valid)
    return price, (after, kept - dead, frozenset(valid - dead))


def _is_dead(problem: TierProblem, done: frozenset[str], name: str) -> bool:
    later = any(name in s.touches for s in problem.steps if s.id not in done)
    return not later and not problem.value[name].kept


def _subsets(names: set[str] | frozenset[str]) -> Iterator[frozenset[str]]:
    rows = sorted(names)
    for some in chain.from_iterable(combinations(rows, n) for n in range(len(rows) + 1)):
        yield frozenset(some)
