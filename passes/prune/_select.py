"""Which units go: the least important ones, in steps that kernels like, until enough is saved."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from mopt.axes import Mask
from mopt.coupling import Coupling
from mopt.ladder import Ladder
from mopt.unit_scores import Scores

_BISECTIONS = 40


def select_uniform(
    found: Coupling, ladders: Sequence[Ladder], saved: Callable[[Mask], float], ratio: float,
    scores: Scores, *, of_channels: bool,
) -> Mask | None:  # fmt: skip
    """The same share of every group, the smallest that saves ``ratio``; None if none does.

    Steps that turn out not to be needed are given back, the most important units first. With
    ``of_channels`` the share itself is ``ratio``.
    """
    if of_channels:
        return _mask(found, {at: one.nearest(ratio) for at, one in enumerate(ladders)}, ladders)
    low, high = 0.0, 1.0
    if saved(_mask(found, {at: one.counts[-1] for at, one in enumerate(ladders)}, ladders)) < ratio:
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        counts = {at: one.nearest(middle) for at, one in enumerate(ladders)}
        if saved(_mask(found, counts, ladders)) >= ratio:
            high = middle
        else:
            low = middle
    counts = {at: one.nearest(high) for at, one in enumerate(ladders)}
    return _give_back(found, ladders, counts, saved, ratio, scores)


def _give_back(
    found: Coupling, ladders: Sequence[Ladder], counts: dict[int, int],
    saved: Callable[[Mask], float], ratio: float, scores: Scores,
) -> Mask:  # fmt: skip
    worth = []
    for at, one in enumerate(ladders):
        place = one.counts.index(counts[at])
        if place:
            block = one.order[one.counts[place - 1] : one.counts[place]]
            worth.append((-float(scores[block].sum()), at, one.counts[place - 1]))
    for _, at, fewer in sorted(worth):
        trial = {**counts, at: fewer}
        if saved(_mask(found, trial, ladders)) >= ratio:
            counts = trial
    return _mask(found, counts, ladders)


def select_global(
    found: Coupling, ladders: Sequence[Ladder], saved: Callable[[Mask], float], ratio: float,
    scores: Scores,
) -> Mask | None:  # fmt: skip
    """The steps that lose the least importance per saving, over all groups; None if too few."""
    counts = dict.fromkeys(range(len(ladders)), 0)
    nothing = np.zeros(found.unit_count, dtype=bool)
    gain = {}
    for at, one in enumerate(ladders):
        trial = nothing.copy()
        trial[one.order[:1]] = True
        gain[at] = max(saved(trial), 1e-12)

    def entry(at: int) -> tuple[float, int]:
        one = ladders[at]
        place = one.counts.index(counts[at])
        block = one.order[counts[at] : one.counts[place + 1]]
        return float(scores[block].sum()) / (len(block) * gain[at]), at

    heap = [entry(at) for at, one in enumerate(ladders) if len(one.counts) > 1]
    heapq.heapify(heap)
    removed = nothing
    while heap and saved(removed) < ratio:
        _, at = heapq.heappop(heap)
        one = ladders[at]
        counts[at] = one.counts[one.counts.index(counts[at]) + 1]
        removed = _mask(found, counts, ladders)
        if counts[at] != one.counts[-1]:
            heapq.heappush(heap, entry(at))
    return removed if saved(removed) >= ratio else None


def _mask(found: Coupling, counts: dict[int, int], ladders: Sequence[Ladder]) -> Mask:
    removed = np.zeros(found.unit_count, dtype=bool)
    for at, count in counts.items():
        removed[ladders[at].order[:count]] = True
    return removed
