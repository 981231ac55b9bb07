"""The compiled inner loop of the search: one plan replayed, and random steps between plans.

A plan is one number a storage: -1 where it is kept from forward, else the backward call from which
on a repeated copy is held until its last use; before that call a copy dies with the call that
wanted it. -2 - k: kept from forward until backward call k, and held again once it is wanted later.
Behind these numbers, as many again: the forward call that makes each storage again, of the several
that may. ``measure`` gives what ``mopt.recompute.replay`` gives for the same plan.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# What ``figures`` holds after ``measure``.
PEAK, KEPT, ITEMS, PLACE = 0, 1, 2, 3
_DONE, _TOO_LONG = -1, -2


class Arrays(NamedTuple):
    """A problem in arrays. Lists lie one after another; entry i of ``*_at`` is where i's begins.

    ``remake``: the first forward call that makes a storage again, -1: none, -2: not one of
    forward's; ``ways``: all of them.
    ``stays``: 1 for forward's results. ``ends``: the last forward call that touches a storage.
    ``plain``: bytes alive at each forward call when nothing is kept for backward.
    """

    size: Ints
    remake: Ints
    ways: Ints
    ways_at: Ints
    stays: Ints
    ends: Ints
    plain: Ints
    again_reads: Ints
    again_reads_at: Ints
    again_makes: Ints
    again_makes_at: Ints
    again_space: Ints
    again_seconds: Floats
    reads: Ints
    reads_at: Ints
    makes: Ints
    makes_at: Ints
    space: Ints
    result: Ints
    constant: int


@njit(nogil=True, error_model="numpy", cache=True)
def order(a: Arrays, since: Ints, items: Ints) -> tuple[int, int]:
    """Write the order of a plan: backward calls, and repeats of call o as -1 - o.

    Returns how many items there are, and -1 or the storage that is neither kept nor repeatable.
    """
    count = 0
    there = np.zeros(len(a.size), np.bool_)
    # Lists of what goes after each backward call.
    head = np.full(len(a.space) + 1, -1, np.int64)
    next_one = np.empty(len(a.size), np.int64)
    for v in range(len(a.size)):
        there[v] = since[v] <= -1
        if since[v] < -1:
            k = -2 - since[v]
            next_one[v] = head[k]
            head[k] = v
    stack = np.empty(4 * len(a.again_reads) + 64, np.int64)
    fresh = np.empty(len(a.size) + 1, np.int64)
    for k in range(len(a.space)):
        new = 0
        for x in range(a.reads_at[k], a.reads_at[k + 1]):
            wanted = a.reads[x]
            if a.remake[wanted] == -2 or there[wanted]:
                continue
            top = 0
            stack[0] = wanted
            while top >= 0:
                v = stack[top]
                if there[v]:
                    top -= 1
                    continue
                o = since[len(a.size) + v]
                if o < 0:
                    return count, int(v)
                missing = False
                for y in range(a.again_reads_at[o + 1] - 1, a.again_reads_at[o] - 1, -1):
                    u = a.again_reads[y]
                    if a.remake[u] != -2 and not there[u]:
                        top += 1
                        if top >= len(stack):
                            return count, _TOO_LONG
                        stack[top] = u
                        missing = True
                if missing:
                    continue
                if count >= len(items) - 1:
                    return count, _TOO_LONG
                items[count] = -1 - o
                count += 1
                for y in range(a.again_makes_at[o], a.again_makes_at[o + 1]):
                    u = a.again_makes[y]
                    if not there[u]:
                        there[u] = True
                        fresh[new] = u
                        new += 1
                top -= 1
        if count >= len(items):
            return count, _TOO_LONG
        items[count] = k
        count += 1
        for x in range(new):
            if since[fresh[x]] > k:
                there[fresh[x]] = False
        v = head[k]
        while v >= 0:
            there[v] = False
            v = next_one[v]
    return count, _DONE


@njit(nogil=True, error_model="numpy", cache=True)
def measure(
    a: Arrays, since: Ints, items: Ints, figures: Ints, used: Ints, watch: int, live: Ints
) -> float:
    """The repeated seconds of a plan, or -2 - v where storage v cannot be had again, -1: too long.

    Fills ``items``, ``figures`` and ``used`` (1 for kept storages that are read). With ``watch``
    at least 0, ``live`` gets 1 for each storage alive at that place (forward calls count first).
    """
    count, problem = order(a, since, items)
    if problem == _TOO_LONG:
        return -1.0
    if problem != _DONE:
        return -2.0 - problem
    seconds = 0.0
    touches = 0
    for i in range(count):
        k = items[i]
        if k < 0:
            o = -1 - k
            seconds += a.again_seconds[o]
            touches += a.again_reads_at[o + 1] - a.again_reads_at[o]
            touches += a.again_makes_at[o + 1] - a.again_makes_at[o]
        else:
            touches += a.reads_at[k + 1] - a.reads_at[k] + a.makes_at[k + 1] - a.makes_at[k]
    # Backwards: whether a copy is read again before it is made again.
    later = np.zeros(len(a.size), np.bool_)
    dies = np.zeros(touches, np.bool_)
    at = touches
    for i in range(count - 1, -1, -1):
        k = items[i]
        if k < 0:
            o = -1 - k
            reads, r0, r1 = a.again_reads, a.again_reads_at[o], a.again_reads_at[o + 1]
            makes, m0, m1 = a.again_makes, a.again_makes_at[o], a.again_makes_at[o + 1]
        else:
            reads, r0, r1 = a.reads, a.reads_at[k], a.reads_at[k + 1]
            makes, m0, m1 = a.makes, a.makes_at[k], a.makes_at[k + 1]
        at -= (r1 - r0) + (m1 - m0)
        for x in range(r0, r1):
            dies[at + x - r0] = not later[reads[x]]
        for x in range(m0, m1):
            dies[at + r1 - r0 + x - m0] = not later[makes[x]]
        for x in range(m0, m1):
            if a.stays[makes[x]] == 0:
                later[makes[x]] = False
        for x in range(r0, r1):
            later[reads[x]] = True
    border = len(a.plain)
    held = np.zeros(len(a.size), np.bool_)
    rise = np.zeros(border + 1, np.int64)
    total = a.constant
    kept = 0
    for v in range(len(a.size)):
        used[v] = 1 if since[v] <= -1 and a.remake[v] != -2 and later[v] else 0
        if used[v]:
            kept += a.size[v]
        if used[v] and a.stays[v] == 0:
            rise[min(a.ends[v] + 1, border)] += a.size[v]
        if used[v] or a.stays[v]:
            held[v] = True
            total += a.size[v]
    peak = 0
    place = 0
    extra = 0
    for i in range(border):
        extra += rise[i]
        if a.plain[i] + extra > peak:
            peak = a.plain[i] + extra
            place = i
    if 0 <= watch < border:
        for v in range(len(a.size)):
            live[v] = 1 if used[v] and a.ends[v] < watch else 0
    at = 0
    for i in range(count):
        k = items[i]
        if k < 0:
            o = -1 - k
            reads, r0, r1 = a.again_reads, a.again_reads_at[o], a.again_reads_at[o + 1]
            makes, m0, m1 = a.again_makes, a.again_makes_at[o], a.again_makes_at[o + 1]
            spare = a.again_space[o]
        else:
            reads, r0, r1 = a.reads, a.reads_at[k], a.reads_at[k + 1]
            makes, m0, m1 = a.makes, a.makes_at[k], a.makes_at[k + 1]
            spare = a.space[k]
        for x in range(m0, m1):
            v = makes[x]
            if a.stays[v]:
                spare += a.size[v]
            elif not held[v]:
                held[v] = True
                total += a.size[v]
        if total + spare > peak:
            peak = total + spare
            place = border + i
        if watch == border + i:
            for v in range(len(a.size)):
                live[v] = 1 if held[v] else 0
        for x in range(r0, r1):
            v = reads[x]
            if dies[at + x - r0] and held[v] and a.result[v] == 0:
                held[v] = False
                total -= a.size[v]
        at += r1 - r0
        for x in range(m0, m1):
            v = makes[x]
            if dies[at + x - m0] and held[v] and a.result[v] == 0:
                held[v] = False
                total -= a.size[v]
        at += m1 - m0
    figures[PEAK] = peak
    figures[KEPT] = kept
    figures[ITEMS] = count
    figures[PLACE] = place
    return seconds


@njit(nogil=True, error_model="numpy", cache=True)
def prices(a: Arrays, since: Ints, wanted: Ints, out: Floats) -> None:
    """Seconds to have each of ``wanted`` again, with all that is not kept either."""
    seen = np.full(len(a.again_seconds), -1, np.int64)
    stack = np.empty(len(a.again_reads) + 2, np.int64)
    for i in range(len(wanted)):
        total = 0.0
        top = 0
        stack[0] = wanted[i]
        while top >= 0:
            o = since[len(a.size) + stack[top]]
            top -= 1
            if o < 0 or seen[o] == i:
                continue
            seen[o] = i
            total += a.again_seconds[o]
            for y in range(a.again_reads_at[o], a.again_reads_at[o + 1]):
                u = a.again_reads[y]
                if since[u] > -1 and a.remake[u] >= 0:
                    top += 1
                    stack[top] = u
        out[i] = total


@njit(nogil=True, error_model="numpy", cache=True)
def anneal(
    a: Arrays,
    start: Ints,
    free: Ints,
    several: Ints,
    last: Ints,
    limits: Ints,
    scale: float,
    price_of_byte: float,
    steps: int,
    seed: int,
    items: Ints,
    best: Ints,
) -> float:
    """Random steps from ``start``, colder and colder; the cheapest plan within the limits.

    ``free`` are the storages whose number may change, ``several`` those of them that can be made
    again in several ways, ``last`` the backward call of each one's last
    read, ``limits`` the peak and the kept bytes allowed, ``scale`` the seconds of an ordinary step.
    Returns the seconds of ``best``, or -1 where no plan within the limits was seen.
    """
    np.random.seed(seed)
    now = start.copy()
    used = np.empty(len(a.size), np.int64)
    figures = np.empty(4, np.int64)
    none = np.empty(0, np.int64)
    never = len(a.space)
    found = -1.0
    found_peak = 0
    energy = np.inf
    for step in range(steps):
        heat = scale * 2.0 * 0.002 ** (step / steps)
        one = two = -1
        was_one = was_two = 0
        if step > 0:
            one = free[np.random.randint(len(free))]
            was_one = now[one]
            kind = np.random.random()
            turn = len(several) > 0 and np.random.random() < 0.15
            if turn:
                v = several[np.random.randint(len(several))]
                one = len(a.size) + v
                was_one = now[one]
                now[one] = a.ways[np.random.randint(a.ways_at[v], a.ways_at[v + 1])]
            elif was_one > -1 and kind < 0.6:
                now[one] = -1
            elif kind < 0.66 and last[one] > 0:
                now[one] = -2 - np.random.randint(last[one])
            elif kind < 0.75:
                now[one] = 0
            elif kind < 0.88:
                now[one] = never
            else:
                now[one] = max(0, last[one] - np.random.randint(1 + min(last[one], 64)))
            if not turn and np.random.random() < 0.5:
                # An exchange: the other way for another value.
                two = free[np.random.randint(len(free))]
                if two == one:
                    two = -1
                else:
                    was_two = now[two]
                    if now[one] <= -1:
                        now[two] = 0 if np.random.random() < 0.7 else never
                    else:
                        now[two] = -1
            same = now[one] == was_one and (two < 0 or now[two] == was_two)
            if same:
                continue
        seconds = measure(a, now, items, figures, used, -1, none)
        if seconds >= 0:
            over = max(0, figures[PEAK] - limits[0]) + max(0, figures[KEPT] - limits[1])
            value = seconds + price_of_byte * over
            if over == 0 and (
                found < 0 or seconds < found or (seconds == found and figures[PEAK] < found_peak)
            ):
                found = seconds
                found_peak = figures[PEAK]
                best[:] = now
        else:
            value = np.inf
        if value <= energy or np.random.random() < np.exp((energy - value) / heat):
            energy = value
        else:
            now[one] = was_one
            if two >= 0:
                now[two] = was_two
    return found
