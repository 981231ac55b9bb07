"""When values are touched, and what lies between: the gaps that a tier plan keeps or gives up.

Between two touches a value either stays in the fast memory or is read again at the second one.
With an order of the steps all gaps are known. Without one, touches that every order runs one after
the other still give gaps, and steps that every order runs within such a gap: what these alone cost
is a bound for every order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mopt.tiers import TierProblem

# Gap ``n`` of a value lies between its touches ``n`` and ``n + 1``.
Gap = tuple[int, int]


@dataclass(frozen=True)
class Spell:
    """Touches ``first`` to ``last`` of a value, from one change of it to the next.

    Its bytes have to be written to the slow memory if a gap in it is given up, or, where there is
    none, if the change itself is streamed.
    """

    value: int
    first: int
    last: int


@dataclass(frozen=True)
class Gaps:
    """``touches[v]`` are the steps that touch value ``v``, as far as their order is known.

    ``inside[t]`` are the gaps that step ``t`` runs within. ``ends[v]`` are the steps that may touch
    ``v`` last. ``spells`` cost a write each.
    """

    problem: TierProblem
    touches: tuple[tuple[int, ...], ...]
    inside: tuple[tuple[Gap, ...], ...]
    ends: tuple[frozenset[int], ...]
    is_ordered: bool

    @cached_property
    def spells(self) -> tuple[Spell, ...]:
        """Stretches of touches after a change, without those whose write is compulsory."""
        found = []
        for v, touches in enumerate(self.touches):
            value = self.problem.values[v]
            starts = [i for i, t in enumerate(touches) if changes(self.problem, t, value.id)]
            ends = [*starts[1:], len(touches)][: len(starts)]
            for first, end in zip(starts, ends, strict=True):
                if not (value.kept and end == len(touches)):
                    found.append(Spell(v, first, min(end, len(touches) - 1)))
        return tuple(found)


def changes(problem: TierProblem, step: int, value: str) -> bool:
    """Whether a step makes a value or writes to it."""
    return value in problem.steps[step].makes or value in problem.steps[step].writes


def takable(gaps: Gaps, t: int) -> tuple[str, ...]:
    """The operands in whose memory the result of step ``t`` may lie."""
    step, problem = gaps.problem.steps[t], gaps.problem
    if len(step.makes) != 1:
        return ()
    return tuple(
        name for name in step.takes
        if t in gaps.ends[problem.number[name]] and not problem.value[name].kept
    )  # fmt: skip


def in_order(problem: TierProblem, order: Sequence[int]) -> Gaps:
    """All gaps of an order."""
    touches = _touches(problem, order)
    inside: list[list[Gap]] = [[] for _ in order]
    place = {t: at for at, t in enumerate(order)}
    for v, steps in enumerate(touches):
        for g in range(len(steps) - 1):
            for at in range(place[steps[g]] + 1, place[steps[g + 1]]):
                inside[order[at]].append((v, g))
    ends = tuple(frozenset(steps[-1:]) for steps in touches)
    return Gaps(problem, tuple(map(tuple, touches)), tuple(map(tuple, inside)), ends, True)


def in_any_order(problem: TierProblem, earlier: Sequence[int], later: Sequence[int]) -> Gaps:
    """The gaps that every order has; ``earlier`` and ``later`` are bit sets of steps."""
    touches = _touches(problem, range(len(problem.steps)))
    chains = tuple(_chain(steps, earlier) for steps in touches)
    inside: list[list[Gap]] = [[] for _ in problem.steps]
    for v, chain in enumerate(chains):
        for g in range(len(chain) - 1):
            between = later[chain[g]] & earlier[chain[g + 1]]
            while between:
                low = between & -between
                inside[low.bit_length() - 1].append((v, g))
                between ^= low
    ends = tuple(
        frozenset(t for t in steps if not any(later[t] >> u & 1 for u in steps))
        for steps in touches
    )
    return Gaps(problem, chains, tuple(map(tuple, inside)), ends, False)


def _touches(problem: TierProblem, order: Sequence[int]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in problem.values]
    for t in order:
        for name in problem.steps[t].touches:
            found[problem.number[name]].append(t)
    return found


def _chain(steps: Sequence[int], earlier: Sequence[int]) -> tuple[int, ...]:
    """The most touches that every order runs one after the other, in that order."""
    best: dict[int, tuple[int, ...]] = {}
    for t in sorted(steps, key=lambda t: earlier[t].bit_count()):
        before = [best[u] for u in best if earlier[t] >> u & 1]
        best[t] = (*max(before, key=len, default=()), t)
    return max(best.values(), key=len, default=())


def reach(problem: TierProblem, extra: Sequence[tuple[int, int]] = ()) -> tuple[
    list[int], list[int], list[int]
] | None:  # fmt: skip
    """Bit sets of what runs before and after each step in every order, and one such order.

    ``extra`` are pairs of steps (first, second) that are to keep that order besides; None where
    that is impossible. The order is as near to the present one as these allow.
    """
    number = {step.id: t for t, step in enumerate(problem.steps)}
    before = [{number[name] for name in step.before} for step in problem.steps]
    for first, second in extra:
        before[second].add(first)
    after: list[list[int]] = [[] for _ in before]
    for t, needs in enumerate(before):
        for u in needs:
            after[u].append(t)
    order = _nearest(before)
    if len(order) < len(before):
        return None
    earlier, later = [0] * len(before), [0] * len(before)
    for t in order:
        for u in before[t]:
            earlier[t] |= earlier[u] | 1 << u
    for t in reversed(order):
        for u in after[t]:
            later[t] |= later[u] | 1 << u
    return earlier, later, order


def _nearest(before: Sequence[set[int]]) -> list[int]:
    """Depth first in the present order: what a step still needs runs right before it.

    Unlike taking the first ready step this keeps stretches together that an extra pair moves.
    """
    order: list[int] = []
    state = [0] * len(before)
    for end in range(len(before)):
        stack = [end]
        while stack:
            t = stack[-1]
            if state[t] == 0:
                state[t] = 1
                waiting = [u for u in before[t] if state[u] != 2]
                if any(state[u] == 1 for u in waiting):
                    return []  # a cycle
                stack.extend(sorted(waiting, reverse=True))
                continue
            stack.pop()
            if state[t] == 1:
                state[t] = 2
                order.append(t)
    return order
