"""When to stop measuring pairs, and what they then prove.

Pure decisions on log ratios: ``mopt.measure`` draws them from processes, tests from distributions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mopt.sign_test import TAIL, Verdict, bound_rank, judge

LOOKS = (10, 20, 40)
# The first look of a quick comparison: 8 is the least number of pairs with a 99 % interval.
QUICK_LOOK = 8
Stopped = Literal["decided", "clear", "pairs", "time"]


@dataclass(frozen=True)
class PairPlan:
    """When to look and when to stop; ``models`` share the error of one gate among them."""

    tolerance: float
    max_pairs: int = LOOKS[-1]
    max_seconds: float | None = None
    quick: bool = False
    models: int = 1

    @property
    def tail(self) -> float:
        """Error allowed on each side of the interval."""
        return TAIL / self.models

    def looks(self) -> tuple[int, ...]:
        """Numbers of pairs at which a verdict may fall; those without a rank are left out."""
        if self.quick:
            return (min(self.max_pairs, LOOKS[0]),)
        looks = [n for n in LOOKS if n < self.max_pairs and bound_rank(n, self.tail)]
        return (*looks, self.max_pairs)

    def most_pairs(self) -> int:
        """Pairs after which it ends in any case."""
        return self.looks()[-1]


def collect_pairs(
    draw: Callable[[], float],
    plan: PairPlan,
    *,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[float], Verdict, Stopped]:
    """Draw log ratios until the plan's rules give a verdict: the ratios, it, and why it ended.

    Another pair is begun only if, going by the slowest so far, it ends within ``max_seconds``; the
    first always is.
    """
    limit = math.log1p(plan.tolerance)
    looks, most = plan.looks(), plan.most_pairs()
    found: list[float] = []
    started, slowest = clock(), 0.0
    while True:
        if progress is not None:
            progress(len(found), most)
        before = clock()
        found.append(draw())
        now = clock()
        slowest = max(slowest, now - before)
        count = len(found)
        if plan.quick and count < most and _is_clear(found, plan.tail):
            verdict = judge(found, limit, tail=plan.tail, is_last=True)
            assert verdict is not None
            return found, verdict, "clear"
        out_of_time = plan.max_seconds is not None and now - started + slowest > plan.max_seconds
        if count >= most or out_of_time:
            verdict = judge(found, limit, tail=plan.tail, is_last=True)
            assert verdict is not None
            return found, verdict, "pairs" if count >= most else "time"
        if count in looks and (verdict := judge(found, limit, tail=plan.tail)):
            return found, verdict, "decided"


def _is_clear(found: Sequence[float], tail: float) -> bool:
    """All pairs on one side, often enough.

    Looking after every pair from the 8th costs nothing: if all of nine agree, all of eight did, so
    the chance of a false alarm is that of the first look, 2 / 2^8.
    """
    if len(found) < QUICK_LOOK or bound_rank(len(found), tail) is None:
        return False
    return min(found) > 0 or max(found) < 0
