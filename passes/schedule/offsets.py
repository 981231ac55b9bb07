"""Where buffers lie: offsets of least peak, or within a capacity, with what was proved about them.

    plan = place(MemoryProblem((Buffer("a", 0, 3, 64), Buffer("b", 2, 5, 64)), capacity=128))

Bounds come first, then a portfolio of greedy placements; where none meets the bound an exact
search with growing limits takes over. See ``docs/memory.md``.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence

from mopt.errors import InputError, UsageError, quote
from mopt.memory import MAIN, Load, MemoryPlan, MemoryProblem, Piece, Status, Storage
from mopt.passes.schedule._bounds import lower_bound
from mopt.passes.schedule._layout import Layout, lay_out
from mopt.passes.schedule._run import Clock

TIME_LIMIT = 30.0


def place(problem: MemoryProblem, *, time_limit: float = TIME_LIMIT, seed: int = 0) -> MemoryPlan:
    """A legal layout of every tier; ``time_limit`` is wall time for all of them, in seconds.

    Without a capacity the peak is made as small as it can be proved to be. With one, a layout that
    fits is enough, though the least peak is tried for first. ``status`` is OPTIMAL where the peak
    equals a proved bound, FEASIBLE where it fits (or there is no capacity), INFEASIBLE where it is
    proved that nothing fits, TIME_OUT where that is open; the offsets are the best ones found
    either way. The first exact search on a machine compiles it, which the limit leaves out.

    The same problem and seed give the same plan, except where the search takes a good part of the
    time limit. Raises UsageError (``time-limit``) and InputError (``fixed-overlap``: two fixed
    buffers share bytes).
    """
    if not time_limit > 0:
        raise UsageError(f"time limit {time_limit} is not positive", code="time-limit")
    start, cpu = time.monotonic(), time.process_time()
    clock = Clock(time_limit)
    _require_apart([s for s in problem.storages if s.offset is not None and s.size])
    names = [MAIN, *(tier.name for tier in problem.tiers)]
    offsets: dict[str, int] = {}
    tiers: dict[str, tuple[Layout, Load]] = {}
    for k, name in enumerate(names):
        storages = [s for s in problem.storages if s.tier == name]
        with clock.until(time.monotonic() + clock.left() / (len(names) - k)):
            tiers[name] = _place_tier(storages, problem.tier(name).capacity, clock, seed)
        found = tiers[name][0].offsets
        for s in storages:
            for member in s.members:
                offsets[member] = found[s.id]
    layout, binding = tiers[MAIN]
    return MemoryPlan(
        offsets={b.id: offsets[b.id] for b in problem.buffers},
        peak=layout.peak,
        lower_bound=layout.low,
        status=_status(problem, {name: tiers[name][0] for name in names}),
        solver=layout.solver,
        order=problem.order,
        tier_peaks={name: tiers[name][0].peak for name in names},
        binding=binding,
        timed_out=any(found.timed_out for found, _ in tiers.values()),
        seconds=time.monotonic() - start - clock.compile_seconds,
        cpu_seconds=time.process_time() - cpu,
        compile_seconds=clock.compile_seconds,
        nodes=clock.nodes,
    )


def _status(problem: MemoryProblem, layouts: dict[str, Layout]) -> Status:
    worst = Status.OPTIMAL
    for name, found in layouts.items():
        capacity = problem.tier(name).capacity
        if capacity is not None and found.low > capacity:
            return Status.INFEASIBLE
        if capacity is not None and found.peak > capacity:
            worst = Status.TIME_OUT
        elif found.peak > found.low and worst is Status.OPTIMAL:
            worst = Status.FEASIBLE
    return worst


def _place_tier(
    storages: Sequence[Storage], capacity: int | None, clock: Clock, seed: int
) -> tuple[Layout, Load]:
    whole = Layout({s.id: s.offset or 0 for s in storages}, 0, 0, "none")
    bounds = [(lower_bound(part), part) for part in _parts([s for s in storages if s.size])]
    bounds.sort(key=lambda pair: -pair[0].bytes)
    binding = bounds[0][0] if bounds else Load(0, 0, 0, ())
    whole.low = binding.bytes
    for k, (_, part) in enumerate(bounds):
        # A part need not end lower than another one must, or does.
        enough = max((x for x in (capacity, whole.peak or None) if x is not None), default=None)
        share = len(part) / sum(len(rest) for _, rest in bounds[k:])
        with clock.until(time.monotonic() + clock.left() * share):
            found = lay_out(part, whole.low, enough, clock, seed)
        whole.offsets.update(found.offsets)
        whole.low = max(whole.low, found.low)
        whole.timed_out |= found.timed_out
        if found.peak > whole.peak:
            whole.peak, whole.solver = found.peak, found.solver
    return whole, binding


def _parts(storages: Sequence[Storage]) -> list[list[Storage]]:
    """Storages cut where none is alive on both sides."""
    parts: list[list[Storage]] = []
    end = 0
    for s in sorted(storages, key=lambda s: s.pieces[0].lower):
        if not parts or s.pieces[0].lower >= end:
            parts.append([])
        parts[-1].append(s)
        end = max(end, s.pieces[-1].upper)
    return parts


def _require_apart(fixed: Sequence[Storage]) -> None:
    """InputError where two fixed storages of a tier want the same bytes at the same time."""
    rows: list[tuple[Storage, Piece]] = sorted(
        ((s, p) for s in fixed for p in s.pieces), key=lambda row: row[1].lower
    )
    for k, (s, p) in enumerate(rows):
        later = bisect_left(rows, p.upper, key=lambda row: row[1].lower)
        for other, q in rows[k + 1 : later]:
            low, high = (s.offset or 0), (other.offset or 0)
            apart = low + p.end <= high + q.first or high + q.end <= low + p.first
            if not apart and s.tier == other.tier:
                raise InputError(
                    f"buffers {quote(s.id)} and {quote(other.id)} are both alive at step "
                    f"{q.lower} and fixed where they share bytes",
                    code="fixed-overlap",
                )
