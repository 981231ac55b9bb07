"""The program over a chain of blocks: which block is run how, and which inputs are kept when.

The recurrence is that of optimal checkpointing of heterogeneous chains (Beaumont et al., rotor,
2019, Theorem 1; several ways per block as in Rockmate, ICML 2023, section 3.2): a segment either
runs its first block for good, in one of its ways, or keeps its own input, runs on to some later
block, solves what follows, and then starts again from its input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from mopt.passes.checkpoint._blocks import Block
from mopt.passes.checkpoint._kernel import Floats, Ints
from mopt.passes.checkpoint._tables import SAVED, Tables

_SLOTS = 400
_INFINITE = np.inf


@njit(nogil=True, error_model="numpy", cache=True)
def _fill(
    slots: int,
    seconds: Floats,
    crossing: Ints,
    through: Ints,
    base: Ints,
    option_at: Ints,
    kept: Ints,
    forward: Ints,
    backward: Ints,
    extra: Floats,
    best: Floats,
    choice: Ints,
) -> None:
    """Fill ``best`` and ``choice`` [first block, last block, slots]; all bytes are in slots.

    ``choice`` is -1 for none, an option's number, or 1,000,000 and the block to run on to.
    ``base`` are results and arriving gradients while the last block of a segment is current.
    """
    count = len(seconds)
    for width in range(count):
        for s in range(count - width):
            t = s + width
            for m in range(slots + 1):
                value = np.inf
                how = -1
                for o in range(option_at[s], option_at[s + 1]):
                    if forward[o] + base[t] > m or backward[o] + base[s] > m:
                        continue
                    now = seconds[s] + extra[o]
                    if width:
                        rest = m - kept[o]
                        if rest < 0:
                            continue
                        now += best[s + 1, t, rest]
                    if now < value:
                        value = now
                        how = o
                run = 0.0
                for far in range(s + 1, t + 1):
                    entry = crossing[far - 2] if far - 1 > s else 0
                    if entry + through[far - 1] + base[t] > m:
                        break
                    run += seconds[far - 1]
                    rest = m - crossing[far - 1]
                    if rest < 0:
                        continue
                    now = run + best[far, t, rest] + best[s, far - 1, m]
                    if now < value:
                        value = now
                        how = 1000000 + far
                best[s, t, m] = value
                choice[s, t, m] = how


class Chain:
    """The solved recurrence of one problem for all budgets up to ``most`` bytes."""

    def __init__(self, tables: Tables, blocks: Sequence[Block], most: int) -> None:
        self.tables, self.blocks = tables, blocks
        self.unit = max(1, (most - tables.problem.constant) / _SLOTS)
        count = len(blocks)
        options = [o for b in blocks for o in b.options]
        at = np.zeros(count + 1, np.int64)
        np.cumsum([len(b.options) for b in blocks], out=at[1:])
        plain = [min(o.forward_peak for o in b.options) for b in blocks]
        cross = [b.crossing for b in blocks]
        inside = [b.crossing for b in blocks for _ in b.options]
        self.best = np.full((count, count, _SLOTS + 1), _INFINITE)
        self.choice = np.full((count, count, _SLOTS + 1), -1, np.int64)
        self.at = at
        _fill(
            _SLOTS, np.array([b.seconds for b in blocks]), self._slots(cross), self._slots(plain),
            self._slots([b.results + b.arrives for b in blocks]), at,
            self._slots([o.kept + c for o, c in zip(options, inside, strict=True)]),
            self._slots([o.forward_peak for o in options]),
            self._slots([o.backward_peak for o in options]),
            np.array([o.seconds for o in options]), self.best, self.choice,
        )  # fmt: skip

    def _slots(self, sizes: Sequence[int]) -> Ints:
        return np.array([np.ceil(s / self.unit) for s in sizes], np.int64)

    def plan(self, budget: int) -> Ints | None:
        """The plan for a budget, as numbers of ``Tables``; None where the chain has none."""
        room = min(_SLOTS, int((budget - self.tables.problem.constant) / self.unit))
        last = len(self.blocks) - 1
        if room < 0 or self.choice[0, last, room] < 0:
            return None
        since = self.tables.blank(())
        since[self.tables.free] = self.tables.never
        self._write(since, 0, last, room, SAVED)
        since[list(self.tables.fixed)] = SAVED
        return since

    def _write(self, since: Ints, s: int, t: int, room: int, start: int) -> None:
        """Enter a segment that is run from backward call ``start`` on (``SAVED``: in forward)."""
        how = int(self.choice[s, t, room])
        blocks = self.blocks
        if how >= 1_000_000:
            far = how - 1_000_000
            self._keep(since, blocks[far - 1].crosses, start)
            self._write(
                since, far, t, room - int(np.ceil(blocks[far - 1].crossing / self.unit)), start
            )
            self._write(since, s, far - 1, room, blocks[far - 1].first)
            return
        block = blocks[s]
        option = block.options[how - int(self.at[s])]
        for local, state in option.since.items():
            v = block.names[local]
            if option.ways[local] >= 0:
                since[len(since) // 2 + v] = block.begin + option.ways[local]
            since[v] = start if state == SAVED else block.first + state
        if s < t:
            self._keep(since, block.crosses, start)
            kept = int(np.ceil((option.kept + block.crossing) / self.unit))
            self._write(since, s + 1, t, room - kept, start)

    @staticmethod
    def _keep(since: Ints, values: Sequence[int], start: int) -> None:
        for v in values:
            since[v] = min(int(since[v]), start)
