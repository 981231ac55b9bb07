"""The judge of memory plans: it works from the buffers alone and shares no code with any solver."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

from mopt.errors import InternalError
from mopt.memory import MAIN, Buffer, MemoryPlan, MemoryProblem, Status

# Bytes [first, end) that a root buffer and its aliases keep busy in [lower, upper).
_Need = tuple[int, int, int, int]
_SHOWN = 10


def require_legal(problem: MemoryProblem, plan: MemoryPlan) -> None:
    """InternalError (``memory-plan``) unless ``check_plan`` finds nothing wrong."""
    wrong = check_plan(problem, plan)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InternalError(f"{plan.solver}: {wrong[0]}{more}", code="memory-plan")


def check_plan(problem: MemoryProblem, plan: MemoryPlan, *, limit: int = _SHOWN) -> list[str]:
    """What is wrong with a plan, at most ``limit`` lines; an empty list means that it is legal.

    Looked at: every buffer has an offset that is not negative, aligned, the fixed one and that of
    what it aliases; no byte belongs to two storages at one step; the peaks are the ends of the
    highest buffers; a plan that claims to fit does; its bound is no higher than its peak, equal
    to it where the plan claims to be optimal, and no lower than the load of any moment. Moves
    between tiers are not looked at: a buffer counts in the tier that the problem gives it.
    """
    found: list[str] = []
    for line in _faults(problem, plan):
        if len(found) == limit:
            break
        found.append(line)
    return found


def _faults(problem: MemoryProblem, plan: MemoryPlan) -> Iterator[str]:
    ids = {b.id for b in problem.buffers}
    for extra in sorted(plan.offsets.keys() - ids):
        yield f"{extra!r} has an offset and is no buffer of the problem"
    missing = sorted(ids - plan.offsets.keys())
    if missing:
        yield from (f"{name!r} has no offset" for name in missing)
        return
    for buffer in problem.buffers:
        yield from _place_faults(buffer, plan.offsets)
    groups = _groups(problem)
    needs = {root: _needs(members) for root, members in groups.items()}
    yield from _clashes(problem, plan, needs)
    yield from _claims(problem, plan, groups, needs)


def _place_faults(buffer: Buffer, offsets: dict[str, int]) -> Iterator[str]:
    at = offsets[buffer.id]
    if at < 0:
        yield f"{buffer.id!r} lies at {at}"
    if at % buffer.alignment:
        yield f"{buffer.id!r} lies at {at}, no multiple of its alignment {buffer.alignment}"
    if buffer.offset is not None and at != buffer.offset:
        yield f"{buffer.id!r} lies at {at} and is fixed at {buffer.offset}"
    if buffer.alias is not None and at != offsets[buffer.alias]:
        yield f"{buffer.id!r} lies at {at}, its base {buffer.alias!r} at {offsets[buffer.alias]}"


def _groups(problem: MemoryProblem) -> dict[str, list[Buffer]]:
    """The buffers that share a storage, the one that is no alias first."""
    above = {b.id: b.alias for b in problem.buffers}
    groups: dict[str, list[Buffer]] = {b.id: [b] for b in problem.buffers if b.alias is None}
    for buffer in problem.buffers:
        root = buffer.id
        while (base := above[root]) is not None:
            root = base
        if root != buffer.id:
            groups[root].append(buffer)
    return groups


def _needs(members: Sequence[Buffer]) -> list[_Need]:
    """When a storage needs which of its bytes; none are kept while all its users rest."""
    size = members[0].size
    start, stop = min(b.lower for b in members), max(b.upper for b in members)
    events = {start, stop}
    for b in members:
        events |= {b.lower, b.upper}
        for gap in b.gaps:
            events |= {gap.lower, gap.upper}
    needs: list[_Need] = []
    steps = sorted(events)
    for k in range(len(steps) - 1):
        step = steps[k]
        first, end, someone = size, 0, False
        for b in members:
            if not b.lower <= step < b.upper:
                continue
            someone = True
            window: tuple[int, int] | None = (0, size)
            for gap in b.gaps:
                if gap.lower <= step < gap.upper:
                    window = gap.window
            if window:
                first, end = min(first, window[0]), max(end, window[1])
        if not someone:
            first, end = 0, size
        if first < end:
            needs.append((step, steps[k + 1], first, end))
    return needs


def _clashes(
    problem: MemoryProblem, plan: MemoryPlan, needs: dict[str, list[_Need]]
) -> Iterator[str]:
    """Walk through time with the busy ranges sorted by address: neighbours may not overlap."""
    tiers = {b.id: b.tier for b in problem.buffers}
    ends: defaultdict[int, list[tuple[str, int, int, str]]] = defaultdict(list)
    starts: defaultdict[int, list[tuple[str, int, int, str]]] = defaultdict(list)
    for root, spans in needs.items():
        at = plan.offsets[root]
        for lower, upper, first, end in spans:
            row = (tiers[root], at + first, at + end, root)
            starts[lower].append(row)
            ends[upper].append(row)
    busy: list[tuple[str, int, int, str]] = []
    refused: defaultdict[tuple[str, int, int, str], int] = defaultdict(int)
    for step in sorted(starts.keys() | ends.keys()):
        for row in ends[step]:
            if refused[row]:
                refused[row] -= 1
            else:
                busy.pop(bisect_left(busy, row))
        for row in starts[step]:
            k = bisect_left(busy, row)
            near = busy[max(0, k - 1) : k + 1]
            tier, first, end, root = row
            hit = next((n for n in near if n[0] == tier and n[1] < end and first < n[2]), None)
            if hit is None:
                busy.insert(k, row)
                continue
            # Left out, so that the list keeps having no overlaps and neighbours stay enough.
            refused[row] += 1
            yield (
                f"at step {step} {root!r} uses bytes {first} to {end} and {hit[3]!r} uses "
                f"{hit[1]} to {hit[2]}"
            )


def _claims(
    problem: MemoryProblem,
    plan: MemoryPlan,
    groups: dict[str, list[Buffer]],
    needs: dict[str, list[_Need]],
) -> Iterator[str]:
    tops: dict[str, int] = {MAIN: 0, **{tier.name: 0 for tier in problem.tiers}}
    for root, members in groups.items():
        if needs[root]:
            tier = members[0].tier
            tops[tier] = max(tops[tier], plan.offsets[root] + members[0].size)
    if plan.peak != tops[MAIN]:
        yield f"the peak is {tops[MAIN]}, the plan says {plan.peak}"
    for name, peak in plan.tier_peaks.items():
        if tops.get(name) != peak:
            yield f"the peak of tier {name!r} is {tops.get(name)}, the plan says {peak}"
    if plan.fits:
        capacities = {MAIN: problem.capacity, **{t.name: t.capacity for t in problem.tiers}}
        for name, capacity in capacities.items():
            if capacity is not None and tops[name] > capacity:
                yield f"tier {name!r} holds {capacity} bytes, the plan needs {tops[name]}"
    if plan.lower_bound > plan.peak:
        yield f"the bound {plan.lower_bound} is above the peak {plan.peak}"
    if plan.status is Status.OPTIMAL and plan.lower_bound < plan.peak:
        yield f"optimal, but the bound is {plan.lower_bound} and the peak {plan.peak}"
    load = _load([needs[root] for root, members in groups.items() if members[0].tier == MAIN])
    if plan.lower_bound < load:
        yield f"the bound {plan.lower_bound} is below the load {load}"


def _load(needs: Sequence[Sequence[_Need]]) -> int:
    change: defaultdict[int, int] = defaultdict(int)
    for spans in needs:
        for lower, upper, first, end in spans:
            change[lower] += end - first
            change[upper] -= end - first
    load = most = 0
    for step in sorted(change):
        load += change[step]
        most = max(most, load)
    return most
