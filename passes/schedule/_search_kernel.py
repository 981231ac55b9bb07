"""The compiled inner loop of the exact layout search.

``search`` is the same walk as ``_search_twin.Twin``, which explains it, on a few integer arrays:
one row an item, one row a section, and lists that the rows point into. Few arrays of one type keep
the compile short.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from mopt.passes.schedule._search_twin import LIMIT, REFUTED, ROOM, ROUNDS, SOLVED
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
    SECTION_COLUMNS,
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
_FAR = np.int64(2**62)
_NONE, _ZERO, _ONE = np.int64(-1), np.int64(0), np.int64(1)


class _State(NamedTuple):
    item: Ints
    section: Ints
    span: Ints
    live: Ints
    near: Ints
    wall: Ints
    log: Ints
    used: Ints


@njit(nogil=True, error_model="numpy")
def _fit(s: _State, i: int, value: int) -> int:
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
def _set(s: _State, i: int, column: int, value: int) -> None:
    """Change a column of an item so that it can be undone."""
    n = s.used[0]
    s.log[n, 0] = i
    s.log[n, 1] = column
    s.log[n, 2] = s.item[i, column]
    s.item[i, column] = value
    s.used[0] = n + 1


@njit(nogil=True, error_model="numpy")
def _mark(s: _State, i: int) -> None:
    for x in range(s.item[i, SPAN], s.item[i + 1, SPAN]):
        t = s.span[x]
        s.section[t, DIRTY] = 1
        s.section[t, STALE] = 1


@njit(nogil=True, error_model="numpy")
def _refresh(s: _State, t: int) -> None:
    """Recompute what is kept about the unplaced items of a section."""
    low = low2 = end = end2 = best_sky = best_rank = _FAR
    low_of = end_of = best = _NONE
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
def _section_holds(s: _State, capacity: int, t: int) -> bool:
    """Whether the live items of a section, each no lower than its bound, can be stacked."""
    at = s.section[t, LIVE]
    count = s.section[t, COUNT]
    for x in range(at + 1, at + count):
        i = s.live[x]
        b = s.item[i, BOUND]
        y = x - 1
        while y >= at and s.item[s.live[y], BOUND] > b:
            s.live[y + 1] = s.live[y]
            y -= 1
        s.live[y + 1] = i
    top = _ZERO
    rest = s.section[t, REST]
    for x in range(at, at + count):
        i = s.live[x]
        b = s.item[i, BOUND]
        if b > top:
            top = b
        if top + rest > capacity:
            return False
        top += s.item[i, SIZE]
        rest -= s.item[i, SIZE]
    return True


@njit(nogil=True, error_model="numpy")
def _sections_hold(s: _State, capacity: int, a: int, b: int) -> bool:
    for t in range(a, b):
        if s.section[t, DIRTY]:
            if not _section_holds(s, capacity, t):
                return False
            s.section[t, DIRTY] = 0
    return True


@njit(nogil=True, error_model="numpy")
def _wait(s: _State, i: int) -> int:
    """The bound of a postponed item given what may still come under it; -1 if nothing can."""
    low = end = _FAR
    bound = s.item[i, BOUND]
    intrude = s.item[i, SKY] + s.item[i, SIZE]
    for x in range(s.item[i, SPAN], s.item[i + 1, SPAN]):
        t = s.span[x]
        if s.section[t, STALE]:
            _refresh(s, t)
        row = s.section[t]
        low = min(low, row[LOW2] if row[LOW_OF] == i else row[LOW])
        end = min(end, row[END2] if row[END_OF] == i else row[END])
        if end <= bound and low < intrude:
            return bound
    if low >= intrude:
        return -1
    return max(bound, _fit(s, i, end))


@njit(nogil=True, error_model="numpy")
def _propagate(s: _State, capacity: int, a: int, b: int) -> bool:
    for _ in range(ROUNDS):
        if not _sections_hold(s, capacity, a, b):
            return False
        changed = False
        for i in range(s.item.shape[0] - 1):
            if s.item[i, BOUND] == s.item[i, SKY] or s.item[i, PLACED]:
                continue
            if s.item[i, FIRST] < a or s.item[i, FIRST] >= b:
                continue
            value = _wait(s, i)
            if value < 0 or value > s.item[i, LIMIT_AT]:
                return False
            if value > s.item[i, BOUND]:
                _set(s, i, BOUND, value)
                _mark(s, i)
                changed = True
        if not changed:
            return True
    return _sections_hold(s, capacity, a, b)


@njit(nogil=True, error_model="numpy")
def _choose(s: _State, capacity: int, lean: float, a: int, b: int) -> int:
    best = _NONE
    best_score = 0.0
    for t in range(a, b):
        if s.section[t, PENDING] == 0:
            continue
        if s.section[t, STALE]:
            _refresh(s, t)
        i = s.section[t, BEST]
        if i >= 0:
            slack = capacity - s.section[t, LOW] - s.section[t, REST]
            score = s.item[i, SKY] + lean * slack
            if (
                best < 0
                or score < best_score
                or (score == best_score and s.item[i, RANK] < s.item[best, RANK])
            ):
                best = i
                best_score = score
    return int(best)


@njit(nogil=True, error_model="numpy")
def _is_free_below(s: _State, i: int) -> bool:
    """Whether no other unplaced item can end at or under the place of this one."""
    for x in range(s.item[i, SPAN], s.item[i + 1, SPAN]):
        t = s.span[x]
        if s.section[t, STALE]:
            _refresh(s, t)
        if s.section[t, END] <= s.item[i, SKY]:
            return False
    return True


@njit(nogil=True, error_model="numpy")
def _place(s: _State, i: int) -> bool:
    """Put an item on its skyline and lift what overlaps it; False if something is too high."""
    size = s.item[i, SIZE]
    top = s.item[i, SKY] + size
    _set(s, i, PLACED, _ONE)
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
    high = _ZERO
    fits = True
    for x in range(s.item[i, NEAR], s.item[i + 1, NEAR]):
        j = s.near[x]
        row = s.item[j]
        if row[PLACED] or (row[SKY] >= top and row[SOFT] == 0):
            continue
        if row[SOFT]:
            _set(s, j, SOFT, _ZERO)
        if row[SKY] < top:
            sky = _fit(s, j, top)
            _set(s, j, SKY, sky)
            if row[BOUND] < sky:
                _set(s, j, BOUND, sky)
                fits = fits and sky <= row[LIMIT_AT]
        s.section[row[FIRST], TOUCH] += 1
        s.section[row[LAST], TOUCH] -= 1
        low = min(low, row[FIRST])
        high = max(high, row[LAST])
    _mark_touched(s, low, high, _ONE)
    return fits


@njit(nogil=True, error_model="numpy")
def _mark_touched(s: _State, low: int, high: int, dirty: int) -> None:
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
def _undo(s: _State, to: int) -> None:
    low = s.section.shape[0]
    high = _ZERO
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
    _mark_touched(s, low, high, _ZERO)


@njit(nogil=True, error_model="numpy")
def _start(s: _State, live_at: Ints) -> bool:
    """Fill the state before anything is placed; False if an item does not fit at all."""
    fits = True
    for i in range(s.item.shape[0] - 1):
        if s.item[i, FIXED] == 0:
            s.item[i, SKY] = _fit(s, i, _ZERO)
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


@njit(nogil=True, error_model="numpy")
def _split(s: _State, capacity: int, a: int, b: int, parts: Ints) -> int:
    """Cut ``[a, b)`` where no unplaced item spans; the rows of ``parts``, tightest last."""
    found = _ZERO
    t = a
    while t < b:
        if s.section[t, PENDING] == 0:
            t += 1
            continue
        start = t
        end = t + 1
        slack = _FAR
        while t < end:
            if s.section[t, PENDING]:
                if s.section[t, STALE]:
                    _refresh(s, t)
                end = max(end, s.section[t, REACH])
                slack = min(slack, capacity - s.section[t, LOW] - s.section[t, REST])
            t += 1
        row = found
        while row > 0 and parts[row - 1, 2] < slack:
            for column in range(3):
                parts[row, column] = parts[row - 1, column]
            row -= 1
        parts[row, 0] = start
        parts[row, 1] = end
        parts[row, 2] = slack
        found += 1
    return int(found)


@njit(cache=True, nogil=True, error_model="numpy")
def search(
    items: Ints,
    span: Ints,
    live: Ints,
    live_at: Ints,
    near: Ints,
    wall: Ints,
    capacity: int,
    lean: float,
    max_nodes: int,
    room: int,
    stop: Ints,
    offset: Ints,
) -> tuple[int, int]:
    """Look for offsets within ``capacity``: (SOLVED, REFUTED, LIMIT or ROOM, nodes visited).

    ``offset`` holds the layout when SOLVED. REFUTED is a proof. LIMIT: ``max_nodes`` were visited
    or ``stop[0]`` was set from outside. ROOM: the log of ``room`` entries ran over; call again
    with more.
    """
    n = items.shape[0] - 1
    m = live_at.size - 1
    s = _State(
        items.copy(),
        np.zeros((m + 1, SECTION_COLUMNS), np.int64),
        span,
        live.copy(),
        near,
        wall,
        np.empty((room, 3), np.int64),
        np.zeros(1, np.int64),
    )
    if not _start(s, live_at):
        return REFUTED, 0
    for i in range(n):
        offset[i] = s.item[i, SKY]
    # One frame a placed item: item, whether postponing it is final, log length, parent frame,
    # part of time, head and length of the list of parts that wait.
    frames = np.empty((n + 1, 8), np.int64)
    depth = _ZERO
    # Parts that wait to be searched: start, end, parent frame, next in the list.
    waiting = np.empty((2 * (n + m) + 4, 4), np.int64)
    heads = _ZERO
    head = _NONE
    parts = np.empty((m + 1, 3), np.int64)
    a = _ZERO
    b = np.int64(m)
    parent = _NONE
    nodes = 0
    while True:
        nodes += 1
        if nodes > max_nodes or stop[0]:
            return LIMIT, nodes
        # The most that one node can log.
        if s.used[0] + (ROUNDS + 4) * n + 4 > room:
            return ROOM, nodes
        alive = _propagate(s, capacity, a, b)
        if alive:
            found = _split(s, capacity, a, b, parts)
            for row in range(found - 1):
                waiting[heads, 0] = parts[row, 0]
                waiting[heads, 1] = parts[row, 1]
                waiting[heads, 2] = parent
                waiting[heads, 3] = head
                head = heads
                heads += 1
            if found == 0:
                if head < 0:
                    return SOLVED, nodes
                a = waiting[head, 0]
                b = waiting[head, 1]
                parent = waiting[head, 2]
                head = waiting[head, 3]
                continue
            a = parts[found - 1, 0]
            b = parts[found - 1, 1]
            i = _choose(s, capacity, lean, a, b)
            alive = i >= 0
            if alive:
                frame = frames[depth]
                frame[0] = i
                frame[1] = _is_free_below(s, i)
                frame[2] = s.used[0]
                frame[3] = parent
                frame[4] = a
                frame[5] = b
                frame[6] = head
                frame[7] = heads
                parent = depth
                depth += 1
                offset[i] = s.item[i, SKY]
                if _place(s, i):
                    continue
        if parent < 0:
            return REFUTED, nodes
        # Back to the decision this part hangs on; parts solved since then are dropped with it.
        depth = parent
        frame = frames[depth]
        for t in range(m):
            s.section[t, DIRTY] = 0
        _undo(s, frame[2])
        i = frame[0]
        parent = frame[3]
        a = frame[4]
        b = frame[5]
        head = frame[6]
        heads = frame[7]
        if frame[1]:
            _set(s, i, BOUND, _fit(s, i, s.item[i, SKY] + 1))
        else:
            # Something could still slip under this item, so it may come to lie here after that.
            _set(s, i, SOFT, _ONE)
        _mark(s, i)
