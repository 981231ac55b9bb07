"""The best order found for a graph: rules first, then exact search stretch by stretch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mopt.passes.schedule._order_branch import branch
from mopt.passes.schedule._order_greedy import candidates
from mopt.passes.schedule._order_problem import (
    OrderProblem,
    Run,
    ancestors,
    descendants,
    forced_bound,
    is_order,
    peak_of,
)
from mopt.passes.schedule._order_search import search

# Operators of a stretch that is searched again around the peak, smaller ones first.
_WINDOWS = (16, 32, 64)
# How near to the bound ends the search that decides one thing after another.
_NEAR = 0.0005


@dataclass(frozen=True)
class OrderResult:
    """An order with its peak, the peak of the present order, and the bound that was proved."""

    order: list[int]
    peak: int
    input_peak: int
    lower_bound: int
    rule: str
    timed_out: bool
    seconds: float

    @property
    def gap(self) -> float:
        """How far the peak may be above the least possible one, as a share of the bound."""
        return self.peak / self.lower_bound - 1 if self.lower_bound else 0.0


def best_order(problem: OrderProblem, time_limit: float = 10.0) -> OrderResult:
    """The order with the least peak found in ``time_limit`` seconds, or the present one.

    Every rule is tried; what they leave above the forced-live bound is searched exactly between
    operators that every order runs at one place, else in windows around the peak, and what is left
    then by deciding one thing after another about what is alive there, which also raises the bound.
    """
    started = time.monotonic()
    deadline = started + time_limit
    bound = forced_bound(problem)
    best, peak, rule = list(range(problem.count)), 0, "input"
    input_peak = peak_of(problem, best)[0]
    peak = input_peak
    for name, order in candidates(problem):
        assert is_order(problem, order), name
        if peak > bound and (found := peak_of(problem, order)[0]) < peak:
            best, peak, rule = order, found, name
    if peak > bound:
        searched, bound = _search_stretches(problem, best, bound, deadline)
        best, rule = _if_better(problem, searched, best, rule, "search")
    if peak_of(problem, best)[0] > bound:
        improved = _search_windows(problem, best, bound, deadline)
        best, rule = _if_better(problem, improved, best, rule, "search")
    if peak_of(problem, best)[0] > bound * (1 + _NEAR) and time.monotonic() < deadline:
        decided, bound = branch(problem, best, bound, deadline)
        best, rule = _if_better(problem, decided, best, rule, "search")
    peak = peak_of(problem, best)[0]
    return OrderResult(
        best, peak, input_peak, min(bound, peak), rule,
        peak > bound and time.monotonic() > deadline, time.monotonic() - started,
    )  # fmt: skip


def _if_better(
    problem: OrderProblem, new: list[int], old: list[int], old_rule: str, rule: str
) -> tuple[list[int], str]:
    assert is_order(problem, new), rule
    better = peak_of(problem, new)[0] < peak_of(problem, old)[0]
    return (new, rule) if better else (old, old_rule)


def _search_stretches(
    problem: OrderProblem, order: list[int], bound: int, deadline: float
) -> tuple[list[int], int]:
    """Every stretch between fixed places in its best order, and the bound this proves.

    The peak of an order is the largest of its stretches, so each can be solved alone; those that
    are at the bound already keep the order they have.
    """
    result: list[int] = []
    proved, run = bound, Run(problem)
    for stretch in _stretches(problem, order):
        own = _runs(run, stretch)
        if own.peak > max(proved, run.peak):
            found = search(run, stretch, max(proved, run.peak), deadline=deadline)
            if found is not None:
                stretch = found.order
                own = _runs(run, stretch)
                # The search treats everything up to its floor alike, so this is the least.
                proved = max(proved, found.peak)
        run = own
        result += stretch
    return result, proved


def _runs(run: Run, stretch: Iterable[int]) -> Run:
    new = run.copy()
    for v in stretch:
        new.run(v)
    return new


def _stretches(problem: OrderProblem, order: list[int]) -> Iterator[list[int]]:
    """Parts of the order that end with an operator every order runs at that very place."""
    earlier, later = ancestors(problem), descendants(problem)
    part: list[int] = []
    for v in order:
        part.append(v)
        if earlier[v].bit_count() + later[v].bit_count() + 1 == problem.count:
            yield part
            part = []
    if part:
        yield part


def _search_windows(
    problem: OrderProblem, order: list[int], bound: int, deadline: float
) -> list[int]:
    """Reorder exactly what runs around the peak, for as long as that lowers it."""
    best = list(order)
    peak, at = peak_of(problem, best)
    while peak > bound and time.monotonic() < deadline:
        for width in _WINDOWS:
            first = max(0, at - width // 2)
            window = best[first : first + width]
            begun = _runs(Run(problem), best[:first])
            found = search(begun, window, bound, states=20_000, deadline=deadline)
            if found is None:
                continue
            trial = best[:first] + found.order + best[first + width :]
            new_peak, new_at = peak_of(problem, trial)
            # The same peak in fewer places is progress, too: the first one moved back.
            if new_peak < peak or (new_peak == peak and new_at > at):
                best, peak, at = trial, new_peak, new_at
                break
        else:
            break
    return best
