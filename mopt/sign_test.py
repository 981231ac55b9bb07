"""The exact interval of a median from order statistics, and the verdict it allows.

If d_1 <= ... <= d_n are independent samples of any distribution with median m, then m lies below
d_k with probability P(B <= k - 1), B binomial (n, 1/2): the sign test. No normality is assumed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "fail", "noisy"]

# 0.5 % on each side: an interval of 99 %.
TAIL = 0.005


def tail_probability(samples: int, rank: int) -> float:
    """The probability that the median lies below the ``rank``-th smallest of ``samples``."""
    return sum(math.comb(samples, i) for i in range(rank)) / 2**samples


def bound_rank(samples: int, tail: float = TAIL) -> int | None:
    """The largest rank whose tail probability is at most ``tail``; None if even 1 has more.

    10, 20 and 40 samples give 1, 4 and 12 for 0.5 %.
    """
    rank = 0
    while rank < samples // 2 and tail_probability(samples, rank + 1) <= tail:
        rank += 1
    return rank or None


@dataclass(frozen=True)
class Interval:
    """The median of some samples and bounds that hold it with probability ``confidence``."""

    median: float
    low: float
    high: float
    confidence: float


def median_interval(samples: Sequence[float], tail: float = TAIL) -> Interval:
    """Bounds at the rank ``tail`` allows; with too few samples the extremes, which hold less.

    ``confidence`` is what the bounds really hold: 1 - 2^(1-n) for the extremes of n samples.
    """
    ordered = sorted(samples)
    rank = bound_rank(len(ordered), tail) or 1
    confidence = max(0.0, 1 - 2 * tail_probability(len(ordered), rank))
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[-rank], confidence)


def judge(
    samples: Sequence[float], limit: float, *, tail: float = TAIL, is_last: bool = False
) -> Verdict | None:
    """The verdict on log ratios (candidate over reference) against ``limit`` = log(1 + tolerance).

    ``fail`` and ``pass`` when a bound of the median is beyond the limit; None (measure more) when
    neither, except at the last look: ``noisy`` if the interval is wider than twice the limit, else
    ``fail`` if the median is above the limit and the lower bound above zero, else ``pass``.
    """
    interval = median_interval(samples, tail)
    has_bounds = bound_rank(len(samples), tail) is not None
    if has_bounds and interval.low > limit:
        return "fail"
    if has_bounds and interval.high < limit:
        return "pass"
    if not is_last:
        return None
    if not has_bounds or interval.high - interval.low > 2 * limit:
        return "noisy"
    return "fail" if interval.median > limit and interval.low > 0 else "pass"
