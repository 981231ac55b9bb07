"""The plan of two memories: orders by rule, exact residency for each, a proof over all of them.

The integer program of one order is small: chains of operators of a hundred steps take hundredths
of a second. The program over every order gives the bound; where it is lower than the best order,
pairs of steps whose order is open are decided one way and the other, until the two meet or time
is over. Long orders are divided: what the linear program keeps or gives up as a whole is decided,
and only the rest is left to the integer program.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from mopt.memory import Status
from mopt.passes.schedule._order_greedy import candidates
from mopt.passes.schedule._order_problem import OrderProblem
from mopt.passes.schedule._tier_gaps import Gaps, in_any_order, in_order, reach
from mopt.passes.schedule._tier_layout import Placed, lay_out, peak_of, spans
from mopt.passes.schedule._tier_program import Kept, TierProgram
from mopt.tiers import TierPlan, TierProblem

# Steps of a problem that goes to the integer program as a whole.
_WHOLE = 400
_LAYOUT_TRIES = 6
_SURE = 1e-6


@dataclass(frozen=True)
class _Answer:
    order: list[int]
    gaps: Gaps
    kept: Kept
    rule: str


def solve_tiers(problem: TierProblem, *, time_limit: float = 30.0, seed: int = 0) -> TierPlan:
    """The order, residency and offsets with the fewest bytes moved that ``time_limit`` finds."""
    started = time.monotonic()
    deadline = started + time_limit * 0.8
    best = _best_by_rule(problem, deadline)
    bound = 0
    if best.kept.cost:
        best, bound = _prove(problem, best, deadline)
    found, kept = _lay_out(problem, best, started + time_limit, seed)
    assert found.layout is not None
    base = problem.compulsory_bytes
    return TierPlan(
        order=tuple(problem.steps[t].id for t in best.order),
        stays=found.stays, spills=found.spills, windows=found.windows,
        workspaces=found.workspaces,
        moved_bytes=base + kept.cost, compulsory_bytes=base, lower_bound=base + bound,
        status=Status.OPTIMAL if kept.cost <= bound else Status.FEASIBLE,
        peak=peak_of(found), slow_bytes=found.layout.tier_peaks["slow"],
        solver=best.rule, timed_out=kept.cost > bound and time.monotonic() > deadline,
        seconds=time.monotonic() - started,
    )  # fmt: skip


def _best_by_rule(problem: TierProblem, deadline: float) -> _Answer:
    """The present order, and those that rules give, each with its best residency."""
    best: _Answer | None = None
    for name, order in _distinct(candidates(_as_order_problem(problem))):
        gaps = in_order(problem, order)
        kept = _residency(gaps, deadline)
        if best is None or kept.cost < best.kept.cost:
            best = _Answer(order, gaps, kept, name)
        if best.kept.cost == 0 or time.monotonic() > deadline:
            break
    assert best is not None
    return best


def _distinct(orders: Iterable[tuple[str, list[int]]]) -> Iterator[tuple[str, list[int]]]:
    seen: set[tuple[int, ...]] = set()
    for name, order in orders:
        if tuple(order) not in seen:
            seen.add(tuple(order))
            yield name, order


def _as_order_problem(problem: TierProblem) -> OrderProblem:
    """The steps with what they make, as the rules for orders see them."""
    step = {s.id: t for t, s in enumerate(problem.steps)}
    made = [v for v in problem.values if not v.given]
    number = {v.id: n for n, v in enumerate(made)}
    return OrderProblem(
        before=tuple(tuple(step[name] for name in s.before) for s in problem.steps),
        makes=tuple(tuple(number[name] for name in s.makes) for s in problem.steps),
        touches=tuple(
            tuple(number[name] for name in s.touches if name in number) for s in problem.steps
        ),
        sizes=tuple(v.bytes for v in made),
        kept=frozenset(number[v.id] for v in made if v.kept),
        workspace=tuple(s.workspace for s in problem.steps),
    )


def _residency(gaps: Gaps, deadline: float, room: int | None = None) -> Kept:
    """What stays in one order: exactly, or divided where the order is long."""
    left = deadline - time.monotonic()
    program = TierProgram(gaps, room)
    if len(gaps.problem.steps) > _WHOLE:
        relaxed = TierProgram(gaps, room, relaxed=True).relax(left / 2)
        if relaxed is not None:
            sure = {
                gap: round(share) for gap, share in relaxed[1].items()
                if abs(share - round(share)) < _SURE
            }  # fmt: skip
            program.fix(sure)
    found = program.solve(max(deadline - time.monotonic(), 0.0))
    return found if found is not None else program.nothing()


def _prove(problem: TierProblem, best: _Answer, deadline: float) -> tuple[_Answer, int]:
    """Decide the order of pairs until the bound of what is open meets the best plan."""
    start = _bound_of(problem, (), deadline)
    assert start is not None
    closed = best.kept.bound if start.kept.bound >= best.kept.cost else best.kept.cost
    made = 0
    heap: list[tuple[int, int, _Node]] = [(start.kept.bound, made, start)]
    while heap and heap[0][0] < best.kept.cost and time.monotonic() < deadline:
        bound, _, node = heapq.heappop(heap)
        gaps = in_order(problem, node.order)
        kept = _residency(gaps, deadline)
        if kept.cost < best.kept.cost:
            best = _Answer(node.order, gaps, kept, "search")
        pair = _open_pair(node)
        if pair is None:
            closed = min(closed, kept.bound)
            continue
        for choice in (pair, pair[::-1]):
            child = _bound_of(problem, (*node.extra, choice), deadline)
            if child is not None:
                made += 1
                heapq.heappush(heap, (max(bound, child.kept.bound), made, child))
    rest = heap[0][0] if heap else best.kept.cost
    return best, min(best.kept.cost, max(rest, start.kept.bound), max(closed, start.kept.bound))


@dataclass(frozen=True)
class _Node:
    """All orders that keep the pairs ``extra``; ``kept.bound`` is below the cost of each."""

    extra: tuple[tuple[int, int], ...]
    earlier: list[int]
    later: list[int]
    order: list[int]
    gaps: Gaps
    kept: Kept


def _bound_of(
    problem: TierProblem, extra: tuple[tuple[int, int], ...], deadline: float
) -> _Node | None:
    """The program over every order that keeps ``extra``; None where no order does."""
    known = reach(problem, extra)
    if known is None:
        return None
    earlier, later, order = known
    gaps = in_any_order(problem, earlier, later)
    left = deadline - time.monotonic()
    if len(problem.steps) <= _WHOLE:
        kept = TierProgram(gaps).solve(left)
    else:
        relaxed = TierProgram(gaps, relaxed=True).relax(left)
        kept = None if relaxed is None else Kept(bound=relaxed[0])
    # Out of time: nothing is proved.
    return _Node(extra, earlier, later, order, gaps, kept or Kept())


def _open_pair(node: _Node) -> tuple[int, int] | None:
    """Two steps in either order, that the answer of the node needs to know the order of.

    Walking along an order, the first step at which what the node keeps does not fit is one; the
    other is the end of a gap that lies around it there and need not.
    """
    problem = node.gaps.problem
    place = {t: at for at, t in enumerate(node.order)}
    for t in node.order:
        forced = set(node.gaps.inside[t])
        total, loose = 0, []
        for v, touches in enumerate(node.gaps.touches):
            for g in range(len(touches) - 1):
                stays = node.kept.gaps.get((v, g), problem.pieces(v))
                if stays and place[touches[g]] < place[t] < place[touches[g + 1]]:
                    total += problem.values[v].bytes // problem.pieces(v) * stays
                    if (v, g) not in forced:
                        loose.append(touches[g : g + 2])
        step = problem.steps[t]
        total += step.workspace + sum(problem.window(name) for name in step.touches)
        if total > problem.fast_bytes:
            for first, second in loose:
                if not node.earlier[t] >> first & 1:
                    return t, first
                if not node.later[t] >> second & 1:
                    return second, t
    for first, second in pairwise(node.order):
        if not node.later[first] >> second & 1:
            return second, first
    return None


def _lay_out(
    problem: TierProblem, best: _Answer, deadline: float, seed: int
) -> tuple[Placed, Kept]:
    """Offsets for the plan; where they do not fit, less is kept until they do."""
    kept, room = best.kept, problem.fast_bytes
    least = max(problem.least_bytes(step) for step in problem.steps)
    for _ in range(_LAYOUT_TRIES):
        found = spans(best.gaps, kept, best.order)
        left = max(deadline - time.monotonic(), 1.0) / 2
        placed = lay_out(best.gaps, best.order, found, left, seed)
        over = peak_of(placed) - problem.fast_bytes
        if over <= 0:
            return placed, kept
        room = max(room - max(over, problem.alignment), least)
        kept = _residency(best.gaps, max(deadline, time.monotonic() + 1.0), room)
    kept = TierProgram(best.gaps).nothing()
    found = spans(best.gaps, kept, best.order)
    return lay_out(best.gaps, best.order, found, 1.0, seed), kept
