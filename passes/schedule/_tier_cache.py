"""What a cache would move: values in the fast memory by recency of use, in the order as written.

The peer that plans are compared with. Values come in when they are first touched, the ones touched
longest ago leave when room is needed, and changed ones are written to the slow memory then. Where
the values of one step do not fit together, the largest are streamed. Fragmentation costs nothing.
"""

from __future__ import annotations

from mopt.tiers import TierProblem, TierStep


def least_recently_used(problem: TierProblem, *, drops_dead: bool = False) -> int:
    """Bytes moved in the order of the problem; with ``drops_dead`` dead values leave for free.

    A cache does not know which values are dead and writes them to the slow memory, too.
    """
    return _Cache(problem, drops_dead).run()


class _Cache:
    """``inside`` holds values by last use, oldest first, with whether they changed."""

    def __init__(self, problem: TierProblem, drops_dead: bool) -> None:
        self.problem, self.drops_dead = problem, drops_dead
        self.inside: dict[str, bool] = {}
        self.used = self.moved = 0
        self.last = {name: t for t, step in enumerate(problem.steps) for name in step.touches}

    def run(self) -> int:
        for t, step in enumerate(self.problem.steps):
            self._step(t, step)
        kept = [v for v in self.problem.values if v.kept and self.inside.get(v.id)]
        return self.moved + sum(v.bytes for v in kept)

    def _step(self, t: int, step: TierStep) -> None:
        problem, value = self.problem, self.problem.value
        streamed: set[str] = set()
        # Those already there stay first, then the smallest.
        wanted = sorted(step.touches, key=lambda n: (n not in self.inside, value[n].bytes))
        must = {min(group, key=lambda n: value[n].bytes) for group in step.one_of}
        wanted.sort(key=lambda n: n not in must)
        taken = self._taken(t, step)
        need = step.workspace + sum(problem.window(name) for name in step.touches)
        for name in wanted:
            extra = 0 if name in taken else value[name].bytes - problem.window(name)
            if need + extra <= problem.fast_bytes:
                need += extra
            else:
                streamed.add(name)
        for name in step.touches:
            changed = name in step.makes or name in step.writes
            if name in streamed:
                self._leave(name)
                self.moved += value[name].bytes * ((name not in step.makes) + changed)
                continue
            if name not in self.inside and name not in step.makes:
                self.moved += value[name].bytes
            was = self.inside.pop(name, False)
            self.inside[name] = was or changed
        self._make_room(step, streamed, taken)
        for name in taken.values():
            self.inside.pop(name, None)
        if self.drops_dead:
            for name in step.touches:
                if self.last[name] == t and not value[name].kept:
                    self.inside.pop(name, None)

    def _taken(self, t: int, step: TierStep) -> dict[str, str]:
        """The result with the operand whose memory it takes over, if any."""
        for name in step.takes:
            if len(step.makes) == 1 and self.last[name] == t and not self.problem.value[name].kept:
                return {step.makes[0]: name}
        return {}

    def _make_room(self, step: TierStep, streamed: set[str], taken: dict[str, str]) -> None:
        problem, value = self.problem, self.problem.value
        room = problem.fast_bytes - step.workspace - sum(map(problem.window, streamed))
        used = sum(value[name].bytes for name in self.inside)
        used -= sum(value[name].bytes for name in taken if name in self.inside)
        touched = set(step.touches)
        for name in list(self.inside):
            if used <= room:
                break
            if name not in touched:
                used -= value[name].bytes
                self._leave(name)

    def _leave(self, name: str) -> None:
        if self.inside.pop(name, False):
            self.moved += self.problem.value[name].bytes
