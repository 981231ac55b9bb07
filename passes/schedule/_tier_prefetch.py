"""Reading ahead: what a step would wait for comes while earlier ones compute, where there is room.

The bytes that move stay the same. Where a step's reads take longer than its computing, the largest
get a place of their own, in room that nothing uses from some earlier step on, and are loaded there
in the time that earlier steps leave the link idle.
"""

from __future__ import annotations

from dataclasses import replace

from mopt.tier_times import Link, run_plan
from mopt.tiers import Stay, TierPlan, TierProblem

# Steps looked back at for idle time of the link.
_FAR = 24


def read_ahead(problem: TierProblem, plan: TierPlan, link: Link) -> TierPlan:
    """The plan with reads moved forward, or the plan itself where that is no faster."""
    trial = _Ahead(problem, plan, link).run()
    if run_plan(problem, trial, link).seconds < run_plan(problem, plan, link).seconds:
        return trial
    return plan


class _Ahead:
    """``idle`` is the time by step in which the link has nothing to do."""

    def __init__(self, problem: TierProblem, plan: TierPlan, link: Link) -> None:
        self.problem, self.plan, self.link = problem, plan, link
        self.stays, self.windows = list(plan.stays), list(plan.windows)
        steps = [problem.step[name] for name in plan.order]
        self.reads: list[list[tuple[int, str]]] = [[] for _ in steps]
        self.idle = [step.seconds for step in steps]
        present = {(s.value, at) for s in plan.stays for at in range(s.lower, s.upper)}
        for at, step in enumerate(steps):
            for name in step.touches:
                if (name, at) in present or not problem.value[name].bytes:
                    continue
                size = problem.value[name].bytes
                if name not in step.makes and name not in step.writes:
                    self.reads[at].append((size, name))
                self.idle[at] -= link.seconds(size, max(problem.window(name) // 2, 1))
        for spill in plan.spills:
            self.idle[spill.at] -= link.seconds(spill.bytes)
        # A load that its own step waits for takes none of the time in which that step computes.

    def run(self) -> TierPlan:
        for at in range(1, len(self.reads)):
            for n, stay in enumerate(self.stays):
                if stay.loaded and stay.lower == at:
                    self._earlier(n, stay)
            for size, name in sorted(self.reads[at], reverse=True):
                if self.idle[at] >= 0:
                    break
                self._load(at, size, name)
        peak = max([self.plan.peak, *(s.offset + s.bytes for s in self.stays)])
        return replace(self.plan, stays=tuple(self.stays), windows=tuple(self.windows), peak=peak)

    def _start(self, at: int, seconds: float) -> int:
        """The step from which on the link has ``seconds`` to spare before ``at``."""
        lower, found = at, 0.0
        while lower > max(0, at - _FAR) and found < seconds:
            lower -= 1
            found += max(self.idle[lower], 0.0)
        return lower

    def _use(self, lower: int, at: int, seconds: float) -> None:
        """Take idle time before ``at``, the latest first."""
        for step in range(at - 1, lower - 1, -1):
            used = min(max(self.idle[step], 0.0), seconds)
            self.idle[step] -= used
            seconds -= used
        if seconds > 0 and lower < at:
            self.idle[lower] -= seconds

    def _load(self, at: int, size: int, name: str) -> None:
        seconds = self.link.seconds(size)
        for lower in range(self._start(at, seconds), at):
            offset = self._room(lower, at + 1, size)
            if offset is None:
                continue
            chunk = max(self.problem.window(name) // 2, 1)
            self.idle[at] += self.link.seconds(size, chunk)
            self._use(lower, at, seconds)
            self.stays.append(Stay(name, 0, size, lower, at + 1, offset, True))
            self.windows = [w for w in self.windows if (w.value, w.at) != (name, at)]
            return

    def _earlier(self, n: int, stay: Stay) -> None:
        """Let a stay begin earlier at the place it has."""
        seconds = self.link.seconds(stay.bytes)
        ready = self._since(stay)
        for lower in range(max(self._start(stay.lower, seconds), ready), stay.lower):
            if self._is_free(lower, stay.lower, stay.offset, stay.bytes):
                self._use(lower, stay.lower, seconds)
                self.stays[n] = replace(stay, lower=lower)
                return

    def _since(self, stay: Stay) -> int:
        """The first step at which what is to be loaded is in the slow memory and not touched."""
        steps = [self.problem.step[name] for name in self.plan.order[: stay.lower]]
        touched = [at for at, step in enumerate(steps) if stay.value in step.touches]
        return touched[-1] + 1 if touched else 0

    def _rows(self, lower: int, upper: int) -> list[tuple[int, int]]:
        rows = [
            (s.offset, s.offset + s.bytes) for s in self.stays
            if s.lower < upper and lower < s.upper
        ]  # fmt: skip
        rows += [(w.offset, w.offset + w.bytes) for w in self.windows if lower <= w.at < upper]
        for at, offset in self.plan.workspaces.items():
            if lower <= at < upper:
                size = self.problem.step[self.plan.order[at]].workspace
                rows.append((offset, offset + size))
        return sorted(rows)

    def _room(self, lower: int, upper: int, size: int) -> int | None:
        """The lowest offset of ``size`` bytes that nothing uses in steps [lower, upper)."""
        grain, offset = self.problem.alignment, 0
        for first, end in self._rows(lower, upper):
            if first - offset >= size:
                break
            offset = max(offset, -(-end // grain) * grain)
        return offset if offset + size <= self.problem.fast_bytes else None

    def _is_free(self, lower: int, upper: int, offset: int, size: int) -> bool:
        return not any(
            first < offset + size and offset < end for first, end in self._rows(lower, upper)
        )
