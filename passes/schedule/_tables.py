"""The arrays of an instance as the compiled search reads them, and the meaning of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mopt.passes.schedule._instance import Instance

Ints = NDArray[np.int64]

# Plain integers would be types of their own to the compiler, one for each value.
# Columns of an item. SPAN, NEAR and WALL say where its rows of those lists start; the row after
# the last item says where they end.
SIZE, ALIGN, LIMIT_AT, FIXED, FIRST, LAST, SPAN, NEAR, WALL, RANK = map(np.int64, range(10))
# Columns that change during a search: the least legal offset on what is placed, the least that is
# still possible, whether the item waits for another one to be placed, whether it is placed.
SKY, BOUND, SOFT, PLACED = map(np.int64, range(10, 14))
_ITEM_COLUMNS = 14

# Columns of a section: its list of live items, how many are left in it, how many of them may move,
# what they weigh; whether it must be checked again, whether the columns from LOW on are stale.
LIVE, COUNT, PENDING, REST, DIRTY, STALE, TOUCH = map(np.int64, range(7))
# Of its movable unplaced items: least bound and next, least end and next with the items they
# belong to, the item to place first, and where the last of them ends.
LOW, LOW_OF, LOW2, END, END_OF, END2, BEST, REACH = map(np.int64, range(7, 15))
SECTION_COLUMNS = 15


class Tables(NamedTuple):
    """Everything about an instance but the capacity (LIMIT_AT) and the preferences (RANK)."""

    items: Ints
    span: Ints
    live: Ints
    live_at: Ints
    near: Ints
    wall: Ints


def make_tables(instance: Instance) -> Tables:
    """The arrays of an instance; ``LIMIT_AT`` and ``RANK`` are left 0."""
    n = len(instance.items)
    fixed = np.array(instance.fixed, np.int64) >= 0
    near = [others[~fixed[others]] for others in instance.overlaps]
    items = np.zeros((n + 1, _ITEM_COLUMNS), np.int64)
    items[:n, SIZE] = instance.size
    items[:n, ALIGN] = [item.align for item in instance.items]
    items[:n, FIXED] = fixed
    items[:n, SKY] = np.where(fixed, instance.fixed, 0)
    items[:n, FIRST] = [instance.first(i) for i in range(n)]
    items[:n, LAST] = [instance.last(i) for i in range(n)]
    items[:, SPAN] = _starts(instance.spans)
    items[:, NEAR] = _starts(near)
    items[:, WALL] = _starts(instance.walls)
    walls = [wall for group in instance.walls for wall in group]
    return Tables(
        items,
        _joined(instance.spans),
        _joined(instance.live),
        _starts(instance.live),
        np.concatenate(near) if n else np.empty(0, np.int64),
        np.array(walls, np.int64).reshape(-1, 2),
    )


def _starts(groups: Sequence[Sequence[object] | Ints]) -> Ints:
    return np.cumsum([0, *(len(group) for group in groups)]).astype(np.int64)


def _joined(groups: Sequence[Sequence[int]]) -> Ints:
    return np.array([i for group in groups for i in group], np.int64)
