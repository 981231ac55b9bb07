"""Random memory problems, and what their layouts cost by other means than the product's solvers."""

from __future__ import annotations

import random
from itertools import combinations

import pulp
from hypothesis import strategies as st

from mopt.memory import Buffer, Gap, MemoryProblem


def plain(rows: list[tuple[int, int, int]], capacity: int | None = None) -> MemoryProblem:
    """Buffers named by number from (lower, upper, size)."""
    buffers = (Buffer(str(k), *row) for k, row in enumerate(rows))
    return MemoryProblem(tuple(buffers), capacity)


@st.composite
def problems(draw: st.DrawFn, most: int = 9, *, plain_only: bool = False) -> MemoryProblem:
    """Few buffers that crowd each other; unless ``plain_only`` with all that buffers may have."""
    buffers: list[Buffer] = []
    fixed_at = 0
    for k in range(draw(st.integers(0, most))):
        lower = draw(st.integers(0, 7))
        upper = lower + draw(st.integers(1, 5))
        size = draw(st.integers(0, 12))
        name = f"b{k}"
        kind = "plain" if plain_only else draw(st.sampled_from(
            ["plain", "plain", "aligned", "gap", "window", "fixed", "alias", "hint"]
        ))  # fmt: skip
        if kind == "aligned":
            buffers.append(Buffer(name, lower, upper, size, draw(st.sampled_from([2, 4, 8]))))
        elif kind in ("gap", "window") and upper - lower > 2 and size > 2:
            window = (1, size - 1) if kind == "window" else None
            gap = Gap(lower + 1, upper - 1, window)
            buffers.append(Buffer(name, lower, upper, size, gaps=(gap,)))
        elif kind == "fixed":
            # One above the other, so that they never clash.
            buffers.append(Buffer(name, lower, upper, size, offset=fixed_at))
            fixed_at += size
        elif kind == "alias" and buffers:
            base = draw(st.sampled_from(buffers))
            buffers.append(Buffer(name, lower, upper, min(size, base.size), alias=base.id))
        elif kind == "hint":
            buffers.append(Buffer(name, lower, upper, size, hint=draw(st.integers(0, 30))))
        else:
            buffers.append(Buffer(name, lower, upper, size))
    return MemoryProblem(tuple(buffers))


def cut_rectangle(count: int, seed: int, steps: int = 60, height: int = 256) -> MemoryProblem:
    """A packing without waste: a rectangle cut again and again. Its best peak is ``height``."""
    rng = random.Random(seed)
    parts = [(0, steps, 0, height)]
    while len(parts) < count:
        k = max(rng.sample(range(len(parts)), min(3, len(parts))), key=lambda k: _area(parts[k]))
        a, b, low, high = parts[k]
        if b - a > 1 and (high - low < 2 or rng.random() < 0.5):
            t = rng.randint(a + 1, b - 1)
            parts[k : k + 1] = [(a, t, low, high), (t, b, low, high)]
        elif high - low > 1:
            t = rng.randint(low + 1, high - 1)
            parts[k : k + 1] = [(a, b, low, t), (a, b, t, high)]
    rng.shuffle(parts)
    return plain([(a, b, (high - low) * 64) for a, b, low, high in parts])


def _area(part: tuple[int, int, int, int]) -> int:
    return (part[1] - part[0]) * (part[3] - part[2])


def least_peak(problem: MemoryProblem) -> int:
    """The least possible peak of plain or aligned buffers, from an integer program by HiGHS."""
    buffers = [b for b in problem.buffers if b.size]
    top = sum(b.size + b.alignment for b in buffers)
    model = pulp.LpProblem("layout", pulp.LpMinimize)
    peak = model.add_variable("peak", 0, top)
    model += peak
    places = {}
    for k, b in enumerate(buffers):
        slot = model.add_variable(f"slot{k}", 0, top // b.alignment, cat="Integer")
        places[b.id] = slot * b.alignment
        model += places[b.id] + b.size <= peak
    for k, (a, b) in enumerate(combinations(buffers, 2)):
        if a.lower < b.upper and b.lower < a.upper:
            over = model.add_variable(f"over{k}", cat="Binary")
            model += places[a.id] + a.size <= places[b.id] + 2 * top * over
            model += places[b.id] + b.size <= places[a.id] + 2 * top * (1 - over)
    model.solve(pulp.HiGHS(msg=False, timeLimit=60, threads=1))
    # `status` says optimal after a time-out too; only `sol_status` tells a proof from a guess.
    assert model.sol_status == pulp.LpSolutionOptimal
    return round(peak.value() or 0)
