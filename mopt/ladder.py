"""How many units of a group may go: the least important first, in steps that kernels like."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np

from mopt.coupling import Group
from mopt.unit_scores import Scores


@dataclass(frozen=True)
class Ladder:
    """A group's units from the least important on, and how many of them may go.

    ``counts`` are the numbers of units that may be removed, from 0 on, each leaving a width that is
    a whole number of steps.
    """

    group: Group
    order: np.ndarray
    counts: tuple[int, ...]

    @staticmethod
    def of(group: Group, scores: Scores, multiple: int, most: float) -> Ladder:
        """A group's ladder: widths are multiples of ``multiple``, at most ``most`` of it goes."""
        order = group.units[np.argsort(scores[group.units], kind="stable")]
        step = multiple // gcd(multiple, group.width)
        total = len(order)
        least = max(1, int(np.ceil(total * (1 - most) - 1e-9)))
        first = -(-least // step) * step
        kept = [count for count in range(first, total, step)]
        return Ladder(group, order, (0, *(total - count for count in reversed(kept))))

    def nearest(self, share: float) -> int:
        """The allowed number nearest to a share of all units; of two equally near the smaller."""
        wanted = share * len(self.order)
        return min(self.counts, key=lambda count: (abs(count - wanted), count))
