"""The compiled inner loop of the exact layout search.

``search`` is the same walk as ``_search_twin.Twin``, which explains it, over the arrays of
``_search_state``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mopt.passes.schedule._search_state import (
    FAR,
    NONE,
    ONE,
    ZERO,
    Ints,
    State,
    change,
    fill,
    fit,
    mark,
    put,
    refresh,
    undo,
)
from mopt.passes.schedule._search_twin import LIMIT, REFUTED, ROOM, ROUNDS, SOLVED
from mopt.passes.schedule._tables import (
    BEST,
    BOUND,
    COUNT,
    DIRTY,
    END,
    END2,
    END_OF,
    FIRST,
    LIMIT_AT,
    LIVE,
    LOW,
    LOW2,
    LOW_OF,
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
)


@njit(nogil=True, error_model="numpy")
def _section_holds(s: State, capacity: int, t: int) -> bool:
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
    top = ZERO
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
def _sections_hold(s: State, capacity: int, a: int, b: int) -> bool:
    for t in range(a, b):
        if s.section[t, DIRTY]:
            if not _section_holds(s, capacity, t):
                return False
            s.section[t, DIRTY] = 0
    return True


@njit(nogil=True, error_model="numpy")
def _wait(s: State, i: int) -> int:
    """The bound of a postponed item given what may still come under it; -1 if nothing can."""
    low = end = FAR
    bound = s.item[i, BOUND]
    intrude = s.item[i, SKY] + s.item[i, SIZE]
    for x in range(s.item[i, SPAN], s.item[i + 1, SPAN]):
        t = s.span[x]
        if s.section[t, STALE]:
            refresh(s, t)
        row = s.section[t]
        low = min(low, row[LOW2] if row[LOW_OF] == i else row[LOW])
        end = min(end, row[END2] if row[END_OF] == i else row[END])
        if end <= bound and low < intrude:
            return bound
    if low >= intrude:
        return -1
    return max(bound, fit(s, i, end))


@njit(nogil=True, error_model="numpy")
def _propagate(s: State, capacity: int, a: int, b: int) -> bool:
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
                change(s, i, BOUND, value)
                mark(s, i)
                changed = True
        if not changed:
            return True
    return _sections_hold(s, capacity, a, b)


@njit(nogil=True, error_model="numpy")
def _choose(s: State, capacity: int, lean: float, a: int, b: int) -> int:
    best = NONE
    best_score = 0.0
    for t in range(a, b):
        if s.section[t, PENDING] == 0:
            continue
        if s.section[t, STALE]:
            refresh(s, t)
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
def _is_free_below(s: State, i: int) -> bool:
    """Whether no other unplaced item can end at or under the place of this one."""
    for x in range(s.item[i, SPAN], s.item[i + 1, SPAN]):
        t = s.span[x]
        if s.section[t, STALE]:
            refresh(s, t)
        if s.section[t, END] <= s.item[i, SKY]:
            return False
    return True


@njit(nogil=True, error_model="numpy")
def _split(s: State, capacity: int, a: int, b: int, parts: Ints) -> int:
    """Cut ``[a, b)`` where no unplaced item spans; the rows of ``parts``, tightest last."""
    found = ZERO
    t = a
    while t < b:
        if s.section[t, PENDING] == 0:
            t += 1
            continue
        start = t
        end = t + 1
        slack = FAR
        while t < end:
            if s.section[t, PENDING]:
                if s.section[t, STALE]:
                    refresh(s, t)
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
    s = State(
        items.copy(),
        np.zeros((m + 1, SECTION_COLUMNS), np.int64),
        span,
        live.copy(),
        near,
        wall,
        np.empty((room, 3), np.int64),
        np.zeros(1, np.int64),
    )
    if not fill(s, live_at):
        return REFUTED, 0
    for i in range(n):
        offset[i] = s.item[i, SKY]
    # One frame a placed item: item, whether postponing it is final, log length, parent frame,
    # part of time, head and length of the list of parts that wait.
    frames = np.empty((n + 1, 8), np.int64)
    depth = ZERO
    # Parts that wait to be searched: start, end, parent frame, next in the list.
    waiting = np.empty((2 * (n + m) + 4, 4), np.int64)
    heads = ZERO
    head = NONE
    parts = np.empty((m + 1, 3), np.int64)
    a = ZERO
    b = np.int64(m)
    parent = NONE
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
                if put(s, i):
                    continue
        if parent < 0:
            return REFUTED, nodes
        # Back to the decision this part hangs on; parts solved since then are dropped with it.
        depth = parent
        frame = frames[depth]
        for t in range(m):
            s.section[t, DIRTY] = 0
        undo(s, frame[2])
        i = frame[0]
        parent = frame[3]
        a = frame[4]
        b = frame[5]
        head = frame[6]
        heads = frame[7]
        if frame[1]:
            change(s, i, BOUND, fit(s, i, s.item[i, SKY] + 1))
        else:
            # Something could still slip under this item, so it may come to lie here after that.
            change(s, i, SOFT, ONE)
        mark(s, i)
