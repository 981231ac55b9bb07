"""The state of the compiled layout search: what each placed item does to it, and back again.

One row an item, one row a section, and lists that the rows point into, all of one type: that keeps
the compile short. ``_search_kernel`` walks over it. It caches what it compiled by its own file: who
edits this one deletes ``__pycache__``, or edits that one, too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from mopt.passes.schedule._tables import (
    ALIGN,
    BEST,
    BOUND,
    COUNT,
    DIRTY,
    END,
    END2,
    END_OF,
    FIRST,
    FIXED,
    LAST,
    LIMIT_AT,
    LIVE,
    LOW,
    LOW2,
    LOW_OF,
    NEAR,
    PENDING,
    PLACED,
    RANK,
    REACH,
    REST,
    SIZE,
    SKY,
    SOFT,
    SPAN,
    STALE,
    TOUCH,
    WALL,
)

Ints = NDArray[np.int64]
# Typed: the compiler would make one version of a function for each plain number passed to it.
FAR = np.int64(2**62)
NONE, ZERO, ONE = np.int64(-1), np.int64(0), np.int64(1)


class State(NamedTuple):
    item: Ints
    section: Ints
    span: Ints
    live: Ints
    near: Ints
    wall: Ints
    log: Ints
    used: Ints


@njit(nogil=True, error_model="numpy")
def fit(s: State, i: int, value: int) -> int:
    """The least legal offset of an item that is at least ``value``."""
    align = s.item[i, ALIGN]
    value = (value + align - 1) // align * align
    for w in range(s.item[i, WALL], s.item[i + 1, WALL]):
        if s.wall[w, 1] > value:
            if s.wall[w, 0] >= value + s.item[i, SIZE]:
                break
            value = (s.wall[w, 1] + align - 1) // align * align
    return value


@njit(nogil=True, error_model="numpy")
def change(s: State, i: int, column: int, value: int) -> None:
    """Change a column of an item so that it can be undone."""
    n = s.used[0]
    s.log[n, 0] = i
    s.log[n, 1] = column
    s.log[n, 2] = s.item[i, column]
    s.item[i, column] = value
    s.used[0] = n + 1


@njit(nogil=True, error_model="numpy")
def mark(s: State, i: int) -> None:
    for x in range(s.item[i, SPAN], s.item[i + 1, SPAN]):
        t = s.span[x]
        s.section[t, DIRTY] = 1
        s.section[t, STALE] = 1


@njit(nogil=True, error_model="numpy")
def refresh(s: State, t: int) -> None:
    """Recompute what is kept about the unplaced items of a section."""
    low = low2 = end = end2 = best_sky = best_rank = FAR
    low_of = end_of = best = NONE
    reach = t + 1
    at = s.section[t, LIVE]
    for x in range(at, at + s.section[t, COUNT]):
        i = s.live[x]
        if s.item[i, FIXED]:
            continue
        b = s.item[i, BOUND]
        e = b + s.item[i, SIZE]
        if b < low:
            low2 = low
            low = b
            low_of = i
        elif b < low2:
            low2 = b
        if e < end:
            end2 = end
            end = e
            end_of = i
        elif e < end2:
            end2 = e
        reach = max(reach, s.item[i, LAST])
        if b == s.item[i, SKY] and b <= best_sky and s.item[i, SOFT] == 0:
            r = s.item[i, RANK]
            if b < best_sky or r < best_rank:
                best_sky = b
                best_rank = r
                best = i
    row = s.section[t]
    row[LOW] = low
    row[LOW_OF] = low_of
    row[LOW2] = low2
    row[END] = end
    row[END_OF] = end_of
    row[END2] = end2
    row[BEST] = best
    row[REACH] = reach
    row[STALE] = 0


@njit(nogil=True, error_model="numpy")
def put(s: State, i: int) -> bool:
    """Put an item on its skyline and lift what overlaps it; False if something is too high."""
    size = s.item[i, SIZE]
    top = s.item[i, SKY] + size
    change(s, i, PLACED, ONE)
    for x in range(s.item[i, SPAN], s.item[i + 1, SPAN]):
        row = s.section[s.span[x]]
        row[REST] -= size
        row[PENDING] -= 1
        row[COUNT] -= 1
        row[DIRTY] = 1
        row[STALE] = 1
        y = row[LIVE]
        while s.live[y] != i:
            y += 1
        while y < row[LIVE] + row[COUNT]:
            s.live[y] = s.live[y + 1]
            y += 1
    low = s.section.shape[0]
    high = ZERO
    fits = True
    for x in range(s.item[i, NEAR], s.item[i + 1, NEAR]):
        j = s.near[x]
        row = s.item[j]
        if row[PLACED] or (row[SKY] >= top and row[SOFT] == 0):
            continue
        if row[SOFT]:
            change(s, j, SOFT, ZERO)
        if row[SKY] < top:
            sky = fit(s, j, top)
            change(s, j, SKY, sky)
            if row[BOUND] < sky:
                change(s, j, BOUND, sky)
                fits = fits and sky <= row[LIMIT_AT]
        s.section[row[FIRST], TOUCH] += 1
        s.section[row[LAST], TOUCH] -= 1
        low = min(low, row[FIRST])
        high = max(high, row[LAST])
    _mark_touched(s, low, high, ONE)
    return fits


@njit(nogil=True, error_model="numpy")
def _mark_touched(s: State, low: int, high: int, dirty: int) -> None:
    """Mark the sections that touched items live in, without walking every item's sections."""
    depth = 0
    for t in range(low, high):
        depth += s.section[t, TOUCH]
        s.section[t, TOUCH] = 0
        if depth > 0:
            s.section[t, STALE] = 1
            s.section[t, DIRTY] |= dirty
    if low < high:
        s.section[high, TOUCH] = 0


@njit(nogil=True, error_model="numpy")
def undo(s: State, to: int) -> None:
    low = s.section.shape[0]
    high = ZERO
    while s.used[0] > to:
        s.used[0] -= 1
        n = s.used[0]
        i = s.log[n, 0]
        s.item[i, s.log[n, 1]] = s.log[n, 2]
        if s.log[n, 1] == PLACED:
            for x in range(s.item[i, SPAN], s.item[i + 1, SPAN]):
                row = s.section[s.span[x]]
                row[REST] += s.item[i, SIZE]
                row[PENDING] += 1
                s.live[row[LIVE] + row[COUNT]] = i
                row[COUNT] += 1
        s.section[s.item[i, FIRST], TOUCH] += 1
        s.section[s.item[i, LAST], TOUCH] -= 1
        low = min(low, s.item[i, FIRST])
        high = max(high, s.item[i, LAST])
    _mark_touched(s, low, high, ZERO)


@njit(nogil=True, error_model="numpy")
def fill(s: State, live_at: Ints) -> bool:
    """Fill the state before anything is placed; False if an item does not fit at all."""
    fits = True
    for i in range(s.item.shape[0] - 1):
        if s.item[i, FIXED] == 0:
            s.item[i, SKY] = fit(s, i, ZERO)
        fits = fits and s.item[i, SKY] <= s.item[i, LIMIT_AT]
        s.item[i, BOUND] = s.item[i, SKY]
        s.item[i, PLACED] = s.item[i, FIXED]
    for t in range(s.section.shape[0] - 1):
        row = s.section[t]
        row[LIVE] = live_at[t]
        row[COUNT] = live_at[t + 1] - live_at[t]
        row[DIRTY] = row[STALE] = 1
        for x in range(live_at[t], live_at[t + 1]):
            row[REST] += s.item[s.live[x], SIZE]
            row[PENDING] += 1 - s.item[s.live[x], FIXED]
    return fits
