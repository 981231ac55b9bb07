"""Instances of the layout problem, made from a seed: packings without waste and training traces."""

from __future__ import annotations

import random

from mopt.memory import Buffer, MemoryProblem

Row = tuple[int, int, int]


def as_problem(rows: list[Row]) -> MemoryProblem:
    """Buffers named by number from (lower, upper, size)."""
    return MemoryProblem(tuple(Buffer(str(k), *row) for k, row in enumerate(rows)))


def cut_rectangle(count: int, seed: int, *, height: int = 1 << 20, grain: int = 1024) -> list[Row]:
    """A rectangle of ``height`` bytes cut at random until there are ``count`` buffers.

    No byte is wasted at any step, so the least peak is ``height`` and hard to find: the public
    instances are of this kind.
    """
    rng = random.Random(seed)
    parts = [(0, max(200, count), 0, height // grain)]
    while len(parts) < count:
        # Of three the largest, so that sizes stay within a few powers of two of each other.
        k = max(rng.sample(range(len(parts)), min(3, len(parts))), key=lambda k: _area(parts[k]))
        a, b, low, high = parts[k]
        in_time, in_space = b - a > 1, high - low > 1
        if in_time and (not in_space or rng.random() < 0.5):
            t = rng.randint(a + 1, b - 1)
            parts[k : k + 1] = [(a, t, low, high), (t, b, low, high)]
        elif in_space:
            t = rng.randint(low + 1, high - 1)
            parts[k : k + 1] = [(a, b, low, t), (a, b, t, high)]
    rng.shuffle(parts)
    return [(a, b, (high - low) * grain) for a, b, low, high in parts]


def _area(part: tuple[int, int, int, int]) -> int:
    return (part[1] - part[0]) * (part[3] - part[2])


def with_holes(rows: list[Row], seed: int, share: float = 0.05) -> list[Row]:
    """The same without a share of the buffers: the free room is in the way of every argument."""
    rng = random.Random(seed)
    return [row for row in rows if rng.random() >= share]


def training_trace(layers: int, seed: int) -> list[Row]:
    """Buffers of one training step of a chain of layers of random widths.

    A layer keeps its output and up to two more results for its backward step, and has short-lived
    ones in both directions; gradients of outputs live for one or two steps, those of weights until
    the end.
    """
    rng = random.Random(seed)
    rows: list[Row] = []
    for layer in range(layers):
        back = 2 * layers - layer
        base = rng.choice([1, 2, 3, 4, 6, 8, 12, 16]) * 4096 * rng.choice([1, 1, 2, 4])
        rows.append((layer, back, base))
        for _ in range(rng.randint(0, 2)):
            size = base * rng.choice([1, 1, 2, 3, 4]) // rng.choice([1, 1, 2])
            if rng.random() < 0.5:
                rows.append((layer, layer + 1 + rng.randint(0, 2), size))
            else:
                rows.append((layer, back, size // rng.choice([1, 2, 4])))
        rows.append((back - 1, back + rng.randint(1, 2), base))
        if rng.random() < 0.4:
            rows.append((back - 1, back, base * rng.choice([1, 2])))
        if rng.random() < 0.3:
            rows.append((back - 1, 2 * layers + 1, rng.choice([256, 1024, 36864, 65536])))
    return rows
