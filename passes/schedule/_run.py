"""Calls of the exact search: which of its two forms runs, how long, and what it answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mopt.passes.schedule._instance import Instance
from mopt.passes.schedule._search_twin import LIMIT, REFUTED, ROOM, SOLVED, Twin
from mopt.passes.schedule._tables import LIMIT_AT, RANK, Tables, make_tables

__all__ = ["LIMIT", "REFUTED", "SOLVED", "Clock", "Guide", "Ready", "run"]

Ints = NDArray[np.int64]
# What the twin does in some hundredths of a second; loading the compiled loop takes longer.
_TWIN_ITEMS, _TWIN_NODES = 24, 150
# Nodes times items of a search that ends by itself in some hundredths of a second.
_BRIEF = 500_000
# Entries of the tables: pairs of items alive together, and of items and steps.
_MOST_ENTRIES = 40_000_000


class Guide(NamedTuple):
    """Preferences of a search: a rank for each item, and how much it leans to tight sections."""

    rank: Sequence[int]
    lean: float


class Ready:
    """An instance with its tables, which all searches on it share."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance

    @cached_property
    def tables(self) -> Tables:
        """Made when first asked for."""
        return make_tables(self.instance)

    @cached_property
    def is_too_large(self) -> bool:
        """Whether the tables would take more than some hundred megabytes."""
        return self.instance.entries() > _MOST_ENTRIES


class Clock:
    """When to stop, and what was spent: nodes visited, seconds of compiling.

    Seconds of compiling move the deadline: they are spent once on a machine, not once a plan.
    """

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.nodes = 0
        self.compile_seconds = 0.0

    def left(self) -> float:
        """Seconds until the deadline, negative after it."""
        return self.deadline - time.monotonic()

    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.left() <= 0

    @contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """An earlier deadline for the block."""
        kept, moved = self.deadline, self.compile_seconds
        self.deadline = min(kept, deadline)
        try:
            yield
        finally:
            self.deadline = kept + self.compile_seconds - moved

    def kernel(self) -> Callable[..., tuple[int, int]]:
        """The compiled search, loaded or compiled when first used."""
        start = time.monotonic()
        kernel = _kernel()
        took = time.monotonic() - start
        self.compile_seconds += took
        self.deadline += took
        return kernel


@cache
def _kernel() -> Callable[..., tuple[int, int]]:
    from mopt.passes.schedule._instance import Item
    from mopt.passes.schedule._search_kernel import search

    tiny = Ready(Instance((Item(1, 1, -1, 1, ((0, 1),), ()),), 1))
    _call(search, tiny, 1, Guide([0], 0.0), 10, np.zeros(1, np.int64))
    return search


def run(
    ready: Ready, capacity: int, guide: Guide, max_nodes: int, clock: Clock
) -> tuple[int, list[int]]:
    """Look for a layout within ``capacity`` bytes: SOLVED, REFUTED or LIMIT, and the offsets.

    LIMIT after ``max_nodes``, or when the clock's time is over.
    """
    if clock.is_over():
        return LIMIT, []
    if len(ready.instance.items) <= _TWIN_ITEMS and not _kernel.cache_info().currsize:
        few = min(max_nodes, _TWIN_NODES)
        answer, nodes, offsets = Twin(ready.instance, capacity, *guide).run(few)
        clock.nodes += nodes
        if answer != LIMIT or few == max_nodes:
            return answer, offsets
    kernel = clock.kernel()
    stop = np.zeros(1, np.int64)
    if max_nodes * len(ready.instance.items) <= _BRIEF:
        answer, nodes, offset = _call(kernel, ready, capacity, guide, max_nodes, stop)
    else:
        # In a thread of its own, so that the time limit and Ctrl-C reach this one.
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(_call, kernel, ready, capacity, guide, max_nodes, stop)
            try:
                wait([future], min(max(clock.left(), 0.0), threading.TIMEOUT_MAX))
            finally:
                stop[0] = 1
        answer, nodes, offset = future.result()
    clock.nodes += nodes
    return answer, offset.tolist() if answer == SOLVED else []


def _call(
    kernel: Callable[..., tuple[int, int]],
    ready: Ready,
    capacity: int,
    guide: Guide,
    max_nodes: int,
    stop: Ints,
) -> tuple[int, int, Ints]:
    tables, instance = ready.tables, ready.instance
    n = len(instance.items)
    items = tables.items.copy()
    items[:n, LIMIT_AT] = instance.limits(capacity)
    items[:n, RANK] = guide.rank
    offset = np.zeros(n, np.int64)
    room = 64 * n + 1024
    while True:
        answer, nodes = kernel(
            items, tables.span, tables.live, tables.live_at, tables.near, tables.wall,
            instance.room(capacity), guide.lean, max_nodes, room, stop, offset,
        )  # fmt: skip
        if answer != ROOM:
            return answer, nodes, offset
        room *= 4
