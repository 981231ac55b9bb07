"""When values go out and come back over one link, and what of that cannot be hidden.

The link moves one value after another. A value goes out as soon as it is made and holds its memory
until it is out; it comes back as late as hides its transfer behind other calls, where the budget
leaves room for it that early. What the calls between do not hide is a stall. Transfers therefore
share the link's bytes in every window between two calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mopt.passes.checkpoint._order import Draft
from mopt.recompute import OFFLOAD, Call, Item, RecomputeProblem, replay


@dataclass(frozen=True)
class Timetable:
    """A plan with its transfers; ``settled`` maps calls that begin one to where it has ended."""

    draft: Draft
    settled: dict[int, int]
    stall_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds that the plan takes longer than the plain step."""
        return self.draft.figures.repeated_seconds + self.stall_seconds


def priced(problem: RecomputeProblem, share: float) -> RecomputeProblem:
    """The problem with each transfer at a share of its time: the price of a second of the link."""
    link = problem.link
    assert link is not None

    def with_price(call: Call) -> Call:
        if call.form != OFFLOAD or call.again is None:
            return call
        size = moved_bytes(problem, call)
        seconds = share * (size / link.write + size / link.read)
        return replace(call, again=replace(call.again, seconds=seconds))

    return replace(problem, forward=tuple(map(with_price, problem.forward)))


def moved_bytes(problem: RecomputeProblem, call: Call) -> int:
    """Bytes of the value that a call moves out."""
    assert call.again is not None
    return sum(problem.sizes[s] for s in call.again.makes)


def schedule(problem: RecomputeProblem, draft: Draft, budget: int) -> Timetable:
    """Transfers of a plan that stays within the budget without them being hidden.

    ``problem`` has no price on transfers: figures are repeated seconds, and stalls apart.
    """
    settled, stall = _outward(problem, draft, budget)
    items, more = _back(problem, draft, settled, budget)
    figures = replay(problem, draft.saved, items, settled)
    return Timetable(Draft(draft.saved, tuple(items), figures), settled, stall + more)


def _outward(problem: RecomputeProblem, draft: Draft, budget: int) -> tuple[dict[int, int], float]:
    """Where each value that goes out has left, and the seconds forward waits for that."""
    assert problem.link is not None
    calls = problem.forward
    leaving = [
        i for i, call in enumerate(calls)
        if call.form == OFFLOAD and not draft.saved.isdisjoint(call.makes)
    ]  # fmt: skip
    live = list(draft.figures.live[: len(calls)])
    ends: dict[int, int] = {}
    for index, call in enumerate(calls):
        for s in (*call.reads, *call.makes):
            ends[s] = index
    clock, free, stall = 0.0, 0.0, 0.0
    done: dict[int, float] = {}
    settled: dict[int, int] = {}
    for index, call in enumerate(calls):
        for one in [o for o in leaving if o in done and o not in settled]:
            value = calls[one].reads[0]
            lives_on = ends[value] >= index or value in draft.saved or value in problem.results
            size = moved_bytes(problem, calls[one])
            # Where the next call has no room for it, forward waits.
            if done[one] > clock and not lives_on and live[index] + size > budget:
                stall += done[one] - clock
                clock = done[one]
            if done[one] <= clock:
                settled[one] = max(index - 1, one)
            elif not lives_on:
                live[index] += size
        if index in leaving:
            free = max(free, clock) + moved_bytes(problem, call) / problem.link.write
            done[index] = free
        clock += call.seconds
    for one in leaving:
        if one not in settled:
            settled[one] = len(calls) - 1
            stall += max(0.0, done[one] - clock)
            clock = max(clock, done[one])
    return settled, stall


def _back(
    problem: RecomputeProblem, draft: Draft, settled: dict[int, int], budget: int
) -> tuple[list[Item], float]:
    """The backward order with each value fetched early enough, and the seconds it waits anyway."""
    assert problem.link is not None
    items = list(draft.items)
    border = len(problem.forward)
    live = list(replay(problem, draft.saved, items, settled).live[border:])
    seconds = [_seconds(problem, item) for item in items]
    starts = [0.0]
    for one in seconds:
        starts.append(starts[-1] + one)
    # From the last transfer to the first: as late as hides it, before what the link does next.
    places: dict[int, int] = {}
    busy = float("inf")
    for place in reversed(range(len(items))):
        call = problem.forward[items[place].index]
        if not items[place].repeat or call.form != OFFLOAD:
            continue
        size = moved_bytes(problem, call)
        begin = min(starts[place], busy) - size / problem.link.read
        busy = begin
        at = place
        again = _made_before(problem, items, place)
        while at > again and starts[at] > begin and live[at - 1] + size <= budget:
            at -= 1
            live[at] += size
        places[place] = at
    # Items that begin a transfer go before the item that is at their place.
    moved: dict[int, list[int]] = {}
    for place, at in sorted(places.items()):
        moved.setdefault(at, []).append(place)
    order: list[int] = []
    for place in range(len(items)):
        order += moved.get(place, [])
        if place not in places:
            order.append(place)
    clock = free = stall = 0.0
    due: dict[int, float] = {}
    for place in order:
        item = items[place]
        reads = problem.backward[item.index].reads
        if item.repeat:
            call = problem.forward[item.index]
            assert call.again is not None
            reads = call.again.reads
            if call.form == OFFLOAD:
                free = max(free, clock) + moved_bytes(problem, call) / problem.link.read
                due[call.again.makes[0]] = free
                continue
        for s in reads:
            wait = due.pop(s, 0.0) - clock
            if wait > 0:
                stall += wait
                clock += wait
        clock += seconds[place]
    return [items[place] for place in order], stall


def _made_before(problem: RecomputeProblem, items: list[Item], place: int) -> int:
    """The first place where a value may be fetched for ``place``: its last copy is not used after.

    Also not before the backward begins.
    """
    call = problem.forward[items[place].index]
    assert call.again is not None
    value = call.again.makes[0]
    for at in range(place - 1, -1, -1):
        item = items[at]
        other = problem.forward[item.index].again if item.repeat else problem.backward[item.index]
        assert other is not None
        if value in other.reads or value in other.makes:
            return at + 1
    return 0


def _seconds(problem: RecomputeProblem, item: Item) -> float:
    if not item.repeat:
        return problem.backward[item.index].seconds
    again = problem.forward[item.index].again
    assert again is not None
    return again.seconds
