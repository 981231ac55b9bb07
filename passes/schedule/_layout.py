"""Layouts of one memory over one stretch of time: greedy first, then the exact search to a proof.

What is tried at a target, a peak that the layout may not exceed: the search on the instance as it
is and on glued ones, each guided by several orders. How long a try lasts grows from round to
round. Targets are the proved bound first, then what would be enough, or without that something
between the bound and the best layout found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from mopt.memory import Storage
from mopt.passes.schedule import _greedy
from mopt.passes.schedule._instance import Instance, make_instance
from mopt.passes.schedule._run import LIMIT, REFUTED, SOLVED, Clock, Guide, run
from mopt.passes.schedule._variants import AS_IS, USUAL, Variant, Variants, greedy_on, guesses
from mopt.passes.schedule._windows import Windows

_ORDERS = (
    ("duration", 0.0), ("size", 0.5), ("area", 0.0), ("duration", 0.5), ("start", 0.0),
    ("size", 0.0), ("duration", 1.0), ("size", 1.0), ("area", 0.5), ("start", 0.5),
)  # fmt: skip
# Orders that are also tried disturbed, from the second round on.
_DISTURBED = 4
# Ways of gluing at random that each round but the first tries.
_GUESSED = 6
# Variants with more items are tried with the first orders only, which mostly work if any does.
_LARGE, _ORDERS_IF_LARGE = 500, 2
# Nodes of a try in the first round, besides some for every item, and how they grow.
_NODES, _NODES_PER_ITEM, _GROWTH = 400, 3, 4
# Part of the time left that a round may spend at the bound before it looks at higher targets.
_BOUND_SHARE = 0.25
_ORDERS_TO_BISECT = 3
# Dives: how far below the best layout towards the bound, tries on each variant, nodes of a try,
# and their part of the time left in a round.
_FIRST_DIVE, _LAST_DIVE, _DIVES, _DIVE_NODES, _DIVE_SHARE = 0.5, 0.01, 5, 50, 0.5
# Storages from which on layouts are made lower window by window, and the part of the time for it.
_MANY, _WINDOW_SHARE = 200, 0.5
# Targets between the bound and the best layout in a round, before tries last longer.
_BISECTIONS = 6


class _Order(NamedTuple):
    """What ranks the items, how much the search leans to tight sections, and a disturbance."""

    name: str
    lean: float
    seed: int | None = None


@dataclass
class Layout:
    """The best layout found, and what was proved: no layout ends below ``low``."""

    offsets: dict[str, int]
    peak: int
    low: int
    solver: str
    timed_out: bool = False

    def take(self, offsets: dict[str, int], peak: int, solver: str) -> None:
        """Keep a layout if it is better."""
        if peak < self.peak:
            self.offsets, self.peak, self.solver = offsets, peak, solver


def lay_out(
    storages: Sequence[Storage], low: int, enough: int | None, clock: Clock, seed: int
) -> Layout:
    """Offsets for storages that all take room, until their peak is proved least or time is over.

    ``low`` is a bound that holds. A layout that ends at ``enough`` or below, where given, is taken
    after one round of tries at the bound.
    """
    best = _greedy_layout(storages, low, clock)
    if best.peak > best.low:
        if clock.is_over():
            best.timed_out = True
        else:
            _Search(storages, best, enough, clock, seed).run()
    return best


def _greedy_layout(storages: Sequence[Storage], low: int, clock: Clock) -> Layout:
    best: Layout | None = None
    for rule in _greedy.rules(storages):
        for use_hints in (True, False):
            if use_hints and all(s.hint is None for s in storages):
                continue
            offsets = _greedy.place(storages, rule.order, rule.best_fit, use_hints, clock.is_over)
            peak = _greedy.top_of(storages, offsets)
            best = best or Layout(offsets, peak, low, rule.name)
            best.take(offsets, peak, rule.name)
            if best.peak <= low or clock.is_over():
                return best
    assert best is not None
    return best


class _Search:
    """Rounds of searches that improve ``best`` in place."""

    def __init__(
        self, storages: Sequence[Storage], best: Layout, enough: int | None, clock: Clock, seed: int
    ) -> None:
        self.storages, self.best, self.enough, self.clock = storages, best, enough, clock
        self.instance = make_instance(storages)
        # With a window in a gap the instance is stricter than the problem.
        self.is_exact = all(p.end - p.first == s.size for s in storages for p in s.pieces)
        # No search finds less: the bound, or more where only the stricter instance says so.
        self.floor = best.low
        self.rng = np.random.default_rng(seed)
        self.variants = Variants(self.instance)
        self.refuted: set[tuple[Variant, int]] = set()

    def run(self) -> None:
        """Until done or out of time."""
        for turn in count():
            before = self.clock.nodes
            self._round(turn)
            if self._is_done():
                return
            if self.clock.is_over() or self.clock.nodes == before:
                self.best.timed_out = True
                return

    def _is_done(self) -> bool:
        peak, enough = self.best.peak, self.enough
        if peak <= self.floor:
            return True
        return enough is not None and (peak <= enough or self.floor > enough)

    def _round(self, turn: int) -> None:
        orders = list(self._orders(turn))
        variants = list(self._variants(turn))
        growth = _GROWTH**turn
        only_target = self.enough is not None and self.enough <= self.floor
        share = 1.0 if only_target else _BOUND_SHARE
        with self.clock.until(time.monotonic() + share * self.clock.left()):
            while self._try(self.floor, orders, variants, growth) == REFUTED:
                if self._is_done():
                    return
        self._greedy([v for v in variants if turn == 0 or v not in USUAL])
        if self._is_done():
            return
        if self.enough is not None:
            if not only_target:
                self._try(self.enough, orders, variants, growth)
            return
        self._dive(turn)
        self._lower_the_top()
        given_up = self.floor
        for _ in range(_BISECTIONS):
            target = (given_up + self.best.peak) // 2
            if self._is_done() or self.clock.is_over() or target <= given_up:
                return
            # Few orders: most targets below the best layout are out of reach for now.
            some = orders[: _ORDERS_TO_BISECT << turn]
            if self._try(target, some, variants, growth) != SOLVED:
                given_up = max(target, self.floor)

    def _dive(self, turn: int) -> None:
        """Many short tries below the best layout, less far below when none of them helps.

        What is found is mostly found without turning back, so a new order is better than patience.
        """
        share = _FIRST_DIVE
        deadline = time.monotonic() + _DIVE_SHARE * self.clock.left()
        while share > _LAST_DIVE and not self._is_done() and time.monotonic() < deadline:
            target = self.best.peak - max(1, int(share * (self.best.peak - self.floor)))
            if any(self._is_solved_by(v, target) for v in self._some_variants(turn)):
                share = min(_FIRST_DIVE, 2 * share)
            else:
                share /= 2

    def _lower_the_top(self) -> None:
        """What lies highest placed again, with what is near it, where there is much else."""
        if self._is_done() or len(self.storages) < _MANY:
            return
        windows = Windows(self.storages, self.clock, self.rng, self._guide)
        with self.clock.until(time.monotonic() + _WINDOW_SHARE * self.clock.left()):
            offsets = windows.lower(self.best.offsets, self.floor)
        self.best.take(offsets, _greedy.top_of(self.storages, offsets), "windows")

    def _guide(self, instance: Instance, number: int) -> Guide:
        order = _ORDERS[number % len(_ORDERS)]
        seed = int(self.rng.integers(2**32)) if number else None
        return Guide(_rank(instance, _Order(*order, seed)), order[1])

    def _some_variants(self, turn: int) -> Iterator[Variant]:
        yield from USUAL
        yield from guesses([int(k) for k in self.rng.integers(2**32, size=_GUESSED << turn)])

    def _is_solved_by(self, variant: Variant, target: int) -> bool:
        """A few disturbed orders on one variant, hardly more nodes than it has items."""
        ready = self.variants.ready(variant, target)
        if ready.is_too_large:
            return False
        for k in self.rng.permutation(len(_ORDERS))[:_DIVES]:
            order = _ORDERS[int(k)]
            seed = int(self.rng.integers(2**32))
            guide = Guide(_rank(ready.instance, _Order(*order, seed)), order[1])
            nodes = _DIVE_NODES + 2 * len(ready.instance.items)
            answer, offsets = run(ready, target, guide, nodes, self.clock)
            if answer == SOLVED:
                self._take(self.variants.original(variant, ready, offsets), "search")
                return True
            if answer == REFUTED or self.clock.is_over():
                return False
        return False

    def _orders(self, turn: int) -> Iterator[_Order]:
        for name, lean in _ORDERS:
            yield _Order(name, lean)
        for name, lean in _ORDERS[: _DISTURBED if turn else 0]:
            yield _Order(name, lean, int(self.rng.integers(2**32)))

    def _variants(self, turn: int) -> Iterator[Variant]:
        yield from USUAL
        if turn:
            yield from guesses([int(k) for k in self.rng.integers(2**32, size=_GUESSED)])

    def _try(
        self, target: int, orders: Sequence[_Order], variants: Sequence[Variant], growth: int
    ) -> int:
        """All orders and variants at one target: SOLVED, REFUTED or LIMIT."""
        for k, order in enumerate(orders):
            for variant in variants:
                if (variant, target) in self.refuted:
                    continue
                if self.clock.is_over():
                    return LIMIT
                ready = self.variants.ready(variant, target)
                items = len(ready.instance.items)
                if (items > _LARGE * growth and k >= _ORDERS_IF_LARGE) or ready.is_too_large:
                    continue
                guide = Guide(_rank(ready.instance, order), order.lean)
                nodes = (_NODES + _NODES_PER_ITEM * items) * growth
                answer, offsets = run(ready, target, guide, nodes, self.clock)
                if answer == SOLVED:
                    self._take(self.variants.original(variant, ready, offsets), "search")
                    return SOLVED
                if answer == REFUTED:
                    self.refuted.add((variant, target))
                    if variant.level == AS_IS:
                        self.floor = max(self.floor, self._next_peak(target))
                        if self.is_exact:
                            self.best.low = max(self.best.low, self.floor)
                        return REFUTED
        return LIMIT

    def _greedy(self, variants: Sequence[Variant]) -> None:
        """Greedy layouts of glued items, which waste less than those of many small ones."""
        for variant in variants:
            ready = self.variants.ready(variant, self.floor)
            if variant.level == AS_IS or len(ready.instance.items) > len(self.storages) // 2:
                continue
            for offsets in greedy_on(ready, self.clock.is_over):
                self._take(self.variants.original(variant, ready, offsets), "glued-greedy")
                if self.clock.is_over():
                    return

    def _take(self, grains: Sequence[int], solver: str) -> None:
        offsets = {
            s.id: g * self.instance.grain for s, g in zip(self.storages, grains, strict=True)
        }
        self.best.take(offsets, _greedy.top_of(self.storages, offsets), solver)

    def _next_peak(self, refuted: int) -> int:
        """The least peak above a refuted one that some storage could end at."""
        grain = self.instance.grain
        return min(
            ((refuted - item.bytes) // grain + 1) * grain + item.bytes
            for item in self.instance.items
        )


def _rank(instance: Instance, order: _Order) -> list[int]:
    """The place of each item in an order."""
    size = np.array(instance.size, float)
    start = np.array([item.spans[0][0] for item in instance.items], float)
    duration = np.array([item.spans[-1][1] for item in instance.items], float) - start
    key, second = {
        "duration": (-duration, -size),
        "size": (-size, -duration),
        "area": (-size * duration, -duration),
        "start": (start, -size),
    }[order.name]
    if order.seed is not None:
        noise = np.random.default_rng(order.seed).normal(0.0, 0.3, len(size))
        key = np.sign(key) * np.exp(np.log(np.abs(key) + 1e-9) + noise)
    rank = np.empty(len(size), np.int64)
    rank[np.lexsort((second, key))] = np.arange(len(size))
    return [int(k) for k in rank]
