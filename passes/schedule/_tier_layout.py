"""From what stays and what is streamed to buffers with offsets, in the fast and the slow memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from mopt.memory import MAIN, Buffer, MemoryPlan, MemoryProblem, Tier
from mopt.passes.schedule._tier_gaps import Gaps, changes, takable
from mopt.passes.schedule._tier_program import Kept
from mopt.passes.schedule.offsets import place
from mopt.tiers import SLOW, Spill, Stay, TierProblem, Window


@dataclass(frozen=True)
class Placed:
    """Everything that lies somewhere, with its offset, and the layout it comes from."""

    stays: tuple[Stay, ...] = ()
    spills: tuple[Spill, ...] = ()
    windows: tuple[Window, ...] = ()
    workspaces: dict[int, int] = field(default_factory=dict)
    layout: MemoryPlan | None = None


def spans(gaps: Gaps, kept: Kept, order: Sequence[int]) -> Placed:
    """What an answer of the program puts where in time; all offsets are 0."""
    return _Spans(gaps, kept, order).placed()


class _Spans:
    """Runs of touches between which the same pieces stay."""

    def __init__(self, gaps: Gaps, kept: Kept, order: Sequence[int]) -> None:
        self.gaps, self.kept, self.problem = gaps, kept, gaps.problem
        self.order = order
        self.position = {t: at for at, t in enumerate(order)}

    def placed(self) -> Placed:
        stays: list[Stay] = []
        for v, touches in enumerate(self.gaps.touches):
            if touches and self.problem.values[v].bytes:
                stays += self._stays(v)
        return Placed(
            tuple(stays),
            tuple(self._spills()),
            tuple(windows_of(self.problem, self.order, stays)),
            {at: 0 for at, t in enumerate(self.order) if self.problem.steps[t].workspace},
        )

    def _stays(self, v: int) -> Iterator[Stay]:
        touches, value = self.gaps.touches[v], self.problem.values[v]
        pieces = self.problem.pieces(v)
        whole = value.bytes // pieces
        runs: dict[tuple[int, int], list[int]] = {}
        for piece in range(pieces):
            for run in self._runs(v, piece):
                runs.setdefault(run, []).append(piece)
        apart = self._is_taken_over(v)
        for (first, last), there in sorted(runs.items()):
            for start, end in [(p, p + 1) for p in there] if apart else _joined(there):
                made = value.id in self.problem.steps[touches[first]].makes
                yield Stay(
                    value.id, start * whole, (end - start) * whole,
                    self.position[touches[first]], self.position[touches[last]] + 1, 0, not made,
                )  # fmt: skip

    def _runs(self, v: int, piece: int) -> Iterator[tuple[int, int]]:
        """First and last touch of every stretch in which a piece stays."""
        touches = self.gaps.touches[v]
        whole = self.problem.pieces(v)
        first = 0
        for i in range(len(touches)):
            stays = i + 1 < len(touches) and self.kept.gaps.get((v, i), whole) > piece
            if stays:
                continue
            if i > first or self._is_needed(v, i, piece):
                yield first, i
            first = i + 1

    def _is_needed(self, v: int, i: int, piece: int) -> bool:
        """Whether a piece that is there for one step alone should be, instead of being streamed.

        It should where it must be, or where it takes no more room than a window for it.
        """
        value, whole = self.problem.values[v], self.problem.pieces(v)
        step = self.problem.steps[self.gaps.touches[v][i]]
        there = self.kept.touches.get((v, i), whole)
        if there <= piece:
            return False
        read_only = not self.problem.writable and not value.given
        if read_only or any(self._factor(i, v, group) == v for group in step.one_of):
            return True
        last = i == len(self.gaps.touches[v]) - 1
        if last and not value.kept and changes(self.problem, self.gaps.touches[v][i], value.id):
            return True  # streaming would write what nobody reads
        missing = self.problem.bytes_beyond(v, self._stays_around(v, i))
        return there == whole and missing <= self.problem.window(value.id)

    def _stays_around(self, v: int, i: int) -> int:
        """The pieces that are there at a touch because they stay before or after it."""
        last = len(self.gaps.touches[v]) - 1
        whole = self.problem.pieces(v)
        around = [self.kept.gaps.get((v, g), whole) for g in (i - 1, i) if 0 <= g < last]
        return max(around, default=0)

    def _factor(self, i: int, v: int, group: Sequence[str]) -> int | None:
        """Which factor of a product lies there: one that stays anyway, else the smallest."""
        problem = self.problem
        numbers = [problem.number[name] for name in group]
        if v not in numbers:
            return None
        t = self.gaps.touches[v][i]
        there = []
        for u in numbers:
            at = self.gaps.touches[u].index(t)
            if self.kept.touches.get((u, at), problem.pieces(u)) == problem.pieces(u):
                stays = self._stays_around(u, at) == problem.pieces(u)
                there.append((not stays, problem.values[u].bytes, u))
        return min(there)[2]

    def _is_taken_over(self, v: int) -> bool:
        """Whether a value takes over another's memory, or another takes over its."""
        name = self.problem.values[v].id
        return any(
            name in self.problem.steps[t].makes or name in takable(self.gaps, t)
            for t in self.gaps.touches[v] if takable(self.gaps, t)
        )  # fmt: skip

    def _spills(self) -> Iterator[Spill]:
        last = len(self.order)
        for v, touches in enumerate(self.gaps.touches):
            value, pieces = self.problem.values[v], self.problem.pieces(v)
            if value.kept and any(changes(self.problem, t, value.id) for t in touches):
                at = max(i for i, t in enumerate(touches) if changes(self.problem, t, value.id))
                yield Spill(value.id, 0, value.bytes, self.position[touches[at]], last, 0)
        for spell in self.gaps.spells:
            v, touches = spell.value, self.gaps.touches[spell.value]
            value, pieces = self.problem.values[v], self.problem.pieces(v)
            stay = [self.kept.gaps.get((v, g), pieces) for g in range(spell.first, spell.last)]
            least = min(stay or [self.kept.touches.get((v, spell.first), pieces)])
            if least < pieces:
                first = value.bytes // pieces * least
                yield Spill(
                    value.id, first, value.bytes - first, self.position[touches[spell.first]],
                    self.position[touches[spell.last]] + 1, 0,
                )  # fmt: skip


def _joined(pieces: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = pieces[0]
    for n, piece in enumerate(pieces):
        if n + 1 == len(pieces) or pieces[n + 1] != piece + 1:
            yield start, piece + 1
            start = pieces[n + 1] if n + 1 < len(pieces) else 0


def windows_of(
    problem: TierProblem, order: Sequence[int], stays: Sequence[Stay]
) -> Iterator[Window]:
    """A window for every value that a step touches and that is not there as a whole."""
    there: dict[tuple[str, int], int] = {}
    for stay in stays:
        for at in range(stay.lower, stay.upper):
            key = stay.value, at
            there[key] = there.get(key, 0) + stay.bytes
    for at, t in enumerate(order):
        for name in problem.steps[t].touches:
            if there.get((name, at), 0) < problem.value[name].bytes:
                yield Window(name, at, 0, problem.window(name))


def lay_out(gaps: Gaps, order: Sequence[int], found: Placed, seconds: float, seed: int) -> Placed:
    """The same with offsets; ``layout`` says whether the fast memory holds it."""
    problem = gaps.problem
    taken = _taken_over(gaps, order, found.stays)
    grain = problem.alignment
    buffers = [
        Buffer(
            f"stay{n}", s.lower, s.upper, s.bytes, grain,
            alias=f"stay{taken[n]}" if n in taken else None,
        )
        for n, s in enumerate(found.stays)
    ]  # fmt: skip
    buffers += [
        Buffer(f"window{n}", w.at, w.at + 1, w.bytes, grain) for n, w in enumerate(found.windows)
    ]
    buffers += [
        Buffer(f"work{at}", at, at + 1, problem.steps[order[at]].workspace, grain)
        for at in found.workspaces
    ]
    given = {v.id for v in problem.values if v.given}
    buffers += [
        Buffer(f"spill{n}", s.at, s.upper, s.bytes, grain, tier=SLOW)
        for n, s in enumerate(found.spills) if s.value not in given
    ]  # fmt: skip
    layout = place(
        MemoryProblem(tuple(buffers), problem.fast_bytes, (Tier(SLOW),)),
        time_limit=seconds, seed=seed,
    )  # fmt: skip
    at = layout.offsets
    return Placed(
        tuple(replace(s, offset=at[f"stay{n}"]) for n, s in enumerate(found.stays)),
        tuple(replace(s, offset=at.get(f"spill{n}", 0)) for n, s in enumerate(found.spills)),
        tuple(replace(w, offset=at[f"window{n}"]) for n, w in enumerate(found.windows)),
        {step: at[f"work{step}"] for step in found.workspaces},
        layout,
    )


def peak_of(found: Placed) -> int:
    """The highest byte of the fast memory that is used."""
    return found.layout.tier_peaks[MAIN] if found.layout else 0


def _taken_over(gaps: Gaps, order: Sequence[int], stays: Sequence[Stay]) -> dict[int, int]:
    """For stays that begin where another one of the same pieces ends: which one it is."""
    starts: dict[tuple[str, int, int, int], int] = {}
    ends: dict[tuple[str, int, int, int], int] = {}
    for n, s in enumerate(stays):
        ends[s.value, s.first, s.bytes, s.upper - 1] = n
        if not s.loaded:
            starts[s.value, s.first, s.bytes, s.lower] = n
    found: dict[int, int] = {}
    for at, t in enumerate(order):
        names = takable(gaps, t)
        if not names:
            continue
        made = gaps.problem.steps[t].makes[0]
        pairs: list[list[tuple[int, int]]] = [
            [(n, ends[name, key[1], key[2], at]) for key, n in starts.items()
             if key[0] == made and key[3] == at and (name, key[1], key[2], at) in ends]
            for name in names
        ]  # fmt: skip
        longest = max(pairs, key=len)
        found.update(longest)
    return found
