"""The judge of plans for two memories: it carries them out and shares no code with any solver.

Every step is run in the plan's order with a map of which bytes of which value are where. What the
plan says must have come from somewhere, must not lie on anything else, and must add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from mopt.errors import InternalError
from mopt.memory import Status
from mopt.tiers import Spill, Stay, TierPlan, TierProblem, TierStep

_SHOWN = 10


def require_sound(problem: TierProblem, plan: TierPlan) -> None:
    """InternalError (``tier-plan``) unless ``check_tiers`` finds nothing wrong."""
    wrong = check_tiers(problem, plan)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InternalError(f"{plan.solver}: {wrong[0]}{more}", code="tier-plan")


def check_tiers(problem: TierProblem, plan: TierPlan, *, limit: int = _SHOWN) -> list[str]:
    """What is wrong with a plan, at most ``limit`` lines; an empty list means that it is sound.

    Looked at: the order can run; bytes are made, loaded from where they were written or streamed
    through a window; one factor of every product is in the fast memory; nothing overlaps there or
    in the slow memory; offsets are aligned and within the capacity; kept values are in the slow
    memory in the end; and the bytes moved are what the plan says.
    """
    found: list[str] = []
    for line in _Replay(problem, plan).faults():
        if len(found) == limit:
            break
        found.append(line)
    return found


class _Replay:
    """Which bytes of a value are valid where, as sets of [first, end) cut at the plan's borders."""

    def __init__(self, problem: TierProblem, plan: TierPlan) -> None:
        self.problem, self.plan = problem, plan
        borders: defaultdict[str, set[int]] = defaultdict(set)
        for v in problem.values:
            borders[v.id] |= {0, v.bytes}
        rows: list[Stay | Spill] = [*plan.stays, *plan.spills]
        for row in rows:
            borders[row.value] |= {row.first, row.first + row.bytes}
        self.cuts = {name: sorted(found) for name, found in borders.items()}
        self.slow: dict[str, set[int]] = {
            v.id: set(self.cuts[v.id][:-1]) if v.given else set() for v in problem.values
        }
        self.fast: defaultdict[str, set[int]] = defaultdict(set)
        self.moved = 0

    def faults(self) -> Iterator[str]:
        problem, plan = self.problem, self.plan
        if sorted(plan.order) != sorted(step.id for step in problem.steps):
            yield "the order is none of the problem's steps"
            return
        done: set[str] = set()
        for at, name in enumerate(plan.order):
            step = problem.step[name]
            if not done.issuperset(step.before):
                yield f"step {name!r} runs before one it must follow"
            done.add(name)
            yield from self._run(at, step)
        for v in problem.values:
            if v.kept and problem.writable and self.slow[v.id] != set(self.cuts[v.id][:-1]):
                yield f"{v.id!r} is not in the slow memory in the end"
        yield from self._overlaps()
        yield from self._claims()

    def _pieces(self, name: str, first: int, end: int) -> set[int]:
        return {cut for cut in self.cuts[name][:-1] if first <= cut < end}

    def _bytes(self, name: str, pieces: set[int]) -> int:
        cuts = self.cuts[name]
        return sum(cuts[cuts.index(piece) + 1] - piece for piece in pieces)

    def _run(self, at: int, step: TierStep) -> Iterator[str]:
        plan, problem = self.plan, self.problem
        here: defaultdict[str, set[int]] = defaultdict(set)
        for stay in plan.stays:
            if not stay.lower <= at < stay.upper:
                continue
            pieces = self._pieces(stay.value, stay.first, stay.first + stay.bytes)
            if stay.lower == at:
                if stay.loaded:
                    if not pieces <= self.slow[stay.value]:
                        yield f"{stay.value!r} is loaded at {at} from where it is not"
                    self.moved += self._bytes(stay.value, pieces)
                elif stay.value not in step.makes:
                    yield f"{stay.value!r} appears at {at} though step {step.id!r} does not make it"
                if pieces & here[stay.value]:
                    yield f"{stay.value!r} is in the fast memory twice at {at}"
            here[stay.value] |= pieces
        self.fast = here
        windows = {w.value: w.bytes for w in plan.windows if w.at == at}
        for name in step.touches:
            whole = set(self.cuts[name][:-1])
            missing = whole - here[name]
            amount = self._bytes(name, missing)
            if amount and windows.get(name, 0) < min(amount, problem.window(name)):
                yield f"{name!r} is streamed at {at} without a window"
            if name not in step.makes and amount:
                if not missing <= self.slow[name]:
                    yield f"step {step.id!r} needs {name!r}, of which {amount} bytes are nowhere"
                self.moved += amount
            if name in step.makes or name in step.writes:
                self.slow[name] = set()
                written = {
                    piece for s in plan.spills if s.value == name and s.at == at
                    for piece in self._pieces(name, s.first, s.first + s.bytes)
                }  # fmt: skip
                if not missing <= written:
                    yield f"{name!r} is neither kept nor written to the slow memory at {at}"
                self.slow[name] = written
                self.moved += self._bytes(name, written)
        for group in step.one_of:
            if not any(here[name] >= set(self.cuts[name][:-1]) for name in group):
                yield f"step {step.id!r} streams {' and '.join(group)} at once"

    def _overlaps(self) -> Iterator[str]:
        """Each place of each memory belongs to one thing at a time."""
        plan, problem = self.plan, self.problem
        position = {name: at for at, name in enumerate(plan.order)}
        fast: defaultdict[int, list[tuple[int, int, Stay | None]]] = defaultdict(list)
        for stay in plan.stays:
            for at in range(stay.lower, stay.upper):
                fast[at].append((stay.offset, stay.offset + stay.bytes, stay))
        for w in plan.windows:
            fast[w.at].append((w.offset, w.offset + w.bytes, None))
        for at, offset in plan.workspaces.items():
            size = problem.step[plan.order[at]].workspace
            fast[at].append((offset, offset + size, None))
        for step in problem.steps:
            if step.workspace and position[step.id] not in plan.workspaces:
                yield f"step {step.id!r} has no place for its workspace"
        for at, rows in fast.items():
            rows.sort(key=lambda row: row[:2])
            highest = rows[0]
            for row in rows[1:]:
                same = row[:2] == highest[:2]
                if row[0] < highest[1] and not self._takes_over(at, highest[2], row[2], same):
                    yield f"byte {row[0]} of the fast memory has two owners at {at}"
                highest = max(highest, row, key=lambda row: row[1])
        slow: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for s in plan.spills:
            if not problem.value[s.value].given:
                for at in range(s.at, s.upper):
                    slow[at].append((s.offset, s.offset + s.bytes))
        for at, places in slow.items():
            places.sort()
            for (_, end), (first, _) in pairwise(places):
                if first < end:
                    yield f"byte {first} of the slow memory has two owners at {at}"

    def _takes_over(self, at: int, one: Stay | None, two: Stay | None, same: bool) -> bool:
        """Whether a result lies where the operand lay that nobody needs any more."""
        step = self.problem.step[self.plan.order[at]]
        for old, new in ((one, two), (two, one)):
            if old is None or new is None or not same:
                continue
            if (
                new.value in step.makes and old.value in step.takes and new.lower == at
                and old.upper == at + 1 and old.first == new.first
                and not self.problem.value[old.value].kept and self._is_last(old.value, at)
            ):  # fmt: skip
                return True
        return False

    def _is_last(self, name: str, at: int) -> bool:
        later = self.plan.order[at + 1 :]
        return not any(name in self.problem.step[step].touches for step in later)

    def _claims(self) -> Iterator[str]:
        plan, problem = self.plan, self.problem
        ends = [s.offset + s.bytes for s in plan.stays]
        ends += [w.offset + w.bytes for w in plan.windows]
        ends += [o + problem.step[plan.order[at]].workspace for at, o in plan.workspaces.items()]
        if max(ends, default=0) != plan.peak:
            yield f"the fast memory is used up to {max(ends, default=0)}, the plan says {plan.peak}"
        if plan.peak > problem.fast_bytes:
            yield f"the fast memory holds {problem.fast_bytes} bytes, the plan needs {plan.peak}"
        offsets = [s.offset for s in plan.stays] + [s.offset for s in plan.spills]
        if any(offset % problem.alignment for offset in offsets):
            yield f"an offset is no multiple of {problem.alignment}"
        if self.moved != plan.moved_bytes:
            yield f"{self.moved} bytes move, the plan says {plan.moved_bytes}"
        touched = {name for step in problem.steps for name in step.touches}
        changed = {name for step in problem.steps for name in (*step.makes, *step.writes)}
        least = sum(v.bytes for v in problem.values if v.given and v.id in touched)
        least += sum(v.bytes for v in problem.values if v.kept and v.id in changed)
        if plan.compulsory_bytes != least:
            yield f"{least} bytes are compulsory, the plan says {plan.compulsory_bytes}"
        if plan.lower_bound > plan.moved_bytes:
            yield f"the bound {plan.lower_bound} is above the {plan.moved_bytes} bytes moved"
        if plan.status is Status.OPTIMAL and plan.lower_bound < plan.moved_bytes:
            yield f"optimal, but the bound is {plan.lower_bound}, and {plan.moved_bytes} move"
