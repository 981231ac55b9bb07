"""From a budget to the limits of the program, corrected by what earlier choices turned out to be.

Estimates enter the program as they are; what was measured moves the limits and scales the amounts:
bytes by an offset, losses by a factor, savings of time by a factor for the formats that were used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mopt.budget import Budget
from mopt.choice import Baseline, Observation
from mopt.errors import UsageError
from mopt.passes.choose._options import ORIGINAL, Option, Sites
from mopt.passes.choose._program import Candidate, Group, Pair, Problem, Solution

# With no budget at all: as fast as possible for a loss that few would notice.
DEFAULT_LOSS = 0.01
# Losses that no metric tells apart, and such that are worth less than time to who asked for bytes.
NEGLIGIBLE = 1e-5
UNNOTICED = 1e-3
# Where no quality may be lost at all, so much is tried: a metric may not tell it from none.
_LEAST_LOSS = 1e-4
# Measured factors beyond these say that something else went wrong.
_LEAST_FACTOR, _LARGEST_FACTOR = 0.02, 1e4
_SAVINGS = (-2.0, 1.5)
# Below this share of the quality, formats that lose much are looked at too.
_LOOSE = 0.98
# Times that differ by less than this share are equal.
_SAME_TIME = 1e-3


@dataclass(frozen=True)
class Corrections:
    """What was learned: ``loss`` multiplies losses; bytes, memory and energy are added to sums.

    ``savings`` multiplies the time that a format saves, by format. ``speed`` is measured over
    estimated time of the uncompressed model.
    """

    loss: float = 1.0
    size: float = 0.0
    memory: float = 0.0
    energy: float = 0.0
    savings: Mapping[str, float] = field(default_factory=dict)
    speed: float = 1.0

    @staticmethod
    def learn(
        observations: Sequence[Observation], baseline: Baseline, budget: Budget
    ) -> Corrections:
        """From all rounds so far; the last one that says something about a quantity counts.

        An estimated time within the interval of the measured one stands, unless it misled.
        """
        loss, size, memory, energy, speed = 1.0, 0.0, 0.0, 0.0, 1.0
        savings: dict[str, float] = {}
        for seen in observations:
            guess, found = seen.estimated, seen.measured
            if guess.get("raw_loss", 0.0) > 0 and "loss" in found:
                factor = found["loss"] / guess["raw_loss"]
                loss = min(max(factor, _LEAST_FACTOR), _LARGEST_FACTOR)
            if "size" in found:
                size += found["size"] - guess["size"]
            if "memory" in found and "memory" in guess:
                memory += found["memory"] - guess["memory"]
            if "energy" in found and "energy" in guess:
                energy += found["energy"] - guess["energy"]
            whole = baseline.latency_ms or guess.get("whole_latency")
            if "latency" in found and seen.baseline.get("latency") and whole:
                speed = seen.baseline["latency"] / whole
                hoped = 1 - guess["raw_latency"] / whole
                low, high = seen.speed_band or (0.0, 0.0)
                limit = budget.get("latency")
                misled = seen.is_slower or (
                    limit and not limit.is_met(found["latency"], seen.baseline["latency"])
                )
                if low <= 1 - hoped <= high and not misled:
                    continue
                saved = 1 - found["latency"] / seen.baseline["latency"]
                if abs(hoped) > 1e-3:
                    factor = min(max(saved / hoped, _SAVINGS[0]), _SAVINGS[1])
                    if seen.is_slower:
                        factor = min(factor, -0.1)
                    savings.update(dict.fromkeys(_blamed(seen, factor), factor))
        return Corrections(loss, size, memory, energy, savings, speed)

    def latency(self, option: Option, original: Option) -> float:
        """The corrected ms of an option."""
        factor = self.saving(option)
        return original.latency_ms - factor * (original.latency_ms - option.latency_ms)

    def saving(self, option: Option) -> float:
        """What the time saved by an option is to be multiplied with."""
        names = set(option.formats.values())
        return min((self.savings.get(name, 1.0) for name in names), default=1.0)


def _blamed(seen: Observation, factor: float) -> set[str]:
    """The formats a missed time is due to; where time was lost, those of layers that lost it."""
    slow = {name for path, name in seen.formats.items() if path in seen.slower_layers}
    return slow if slow and factor < 0 else set(seen.formats.values())


@dataclass(frozen=True)
class Limits:
    """The problem's limits and objective, and the constants that make sums out of its amounts.

    ``whole_ms`` is the estimated time of the uncompressed model. Where the objective is the loss,
    time decides among choices that lose the same ``within`` this share.
    """

    minimize: str
    limits: Mapping[str, float]
    fixed: Mapping[str, float]
    whole_ms: float
    within: float = NEGLIGIBLE


def objective(budget: Budget) -> str:
    """What to minimize: as asked, else loss under limits of size or speed, else latency."""
    if budget.minimize:
        return budget.minimize
    bounded = {constraint.what for constraint in budget.constraints} - {"quality"}
    return "loss" if bounded else "latency"


def same_loss(budget: Budget) -> float:
    """How far losses may be apart before the smaller one is worth time.

    Who limits bytes and says no more wants a model that is smaller and not slower than it need be.
    """
    return NEGLIGIBLE if budget.minimize or budget.get("latency") else UNNOTICED


def asks_for_size(budget: Budget) -> bool:
    """Whether fewer stored bytes are worth something even where nothing runs faster."""
    return budget.minimize == "size" or bool(budget.get("size") or budget.get("memory"))


def allows_loss(budget: Budget) -> bool:
    """Whether so much quality may be lost that low ranks are worth their search."""
    quality = budget.get("quality")
    return quality is not None and quality.limit(1.0) <= _LOOSE


def read_limits(
    budget: Budget, sites: Sequence[Sites], baseline: Baseline, learned: Corrections,
    seen: Sequence[Observation],
) -> Limits:  # fmt: skip
    """The budget in the program's own units. Raises UsageError for what nothing is known about."""
    stored = sum(one.options[0].size_bytes for one in sites)
    timed = sum(one.options[0].latency_ms for one in sites)
    whole_ms = baseline.latency_ms if baseline.latency_ms is not None else timed
    peak = next((o.baseline["memory"] for o in reversed(seen) if "memory" in o.baseline), None)
    peak = baseline.peak_bytes if peak is None else peak
    fixed = {
        "size": baseline.size_bytes - stored + learned.size,
        "latency": whole_ms - timed,
    }
    if peak is not None:
        fixed["memory"] = peak - stored + learned.memory
    energies = [one.options[0].energy_mj for one in sites]
    if baseline.energy_mj is not None and None not in energies:
        used = sum(e for e in energies if e is not None)
        fixed["energy"] = baseline.energy_mj - used + learned.energy
    limits: dict[str, float] = {}
    for constraint in budget.constraints:
        if constraint.what == "quality":
            limits["loss"] = max(1.0 - constraint.limit(1.0), _LEAST_LOSS)
        elif constraint.what == "size":
            limits["size"] = constraint.limit(baseline.size_bytes) - fixed["size"]
        elif constraint.what == "latency":
            limit = constraint.value * whole_ms
            if not constraint.relative:
                limit = constraint.value / learned.speed
            limits["latency"] = limit - fixed["latency"]
        elif constraint.what == "memory":
            if peak is not None:  # else the first round finds out
                limits["memory"] = constraint.limit(peak) - fixed["memory"]
        elif baseline.energy_mj is not None and "energy" in fixed:
            limits["energy"] = constraint.limit(baseline.energy_mj) - fixed["energy"]
        else:
            raise UsageError(
                f"budget {constraint.text!r}: no estimate of {constraint.what} for this target",
                code="no-estimate",
                hint="its profile has no energies (mopt devices show); limit latency or size",
            )
    if not budget.constraints and budget.minimize is None:
        limits["loss"] = DEFAULT_LOSS
    return Limits(objective(budget), limits, fixed, whole_ms, same_loss(budget))


def make_problem(
    sites: Sequence[Sites], limits: Limits, learned: Corrections, pairs: Sequence[Pair] = ()
) -> Problem:
    """The integer program, everything corrected by what was learned."""
    scaled = [
        replace(pair, amounts={
            q: learned.loss * amount if q == "loss" else amount
            for q, amount in pair.amounts.items()
        })
        for pair in pairs
    ]  # fmt: skip
    groups = []
    for one in sites:
        original = one.options[0]
        candidates = [
            Candidate(
                option.name,
                {
                    "size": option.size_bytes,
                    "memory": option.memory_bytes,
                    "latency": learned.latency(option, original),
                    "energy": option.energy_mj or 0.0,
                    "loss": learned.loss * option.loss,
                },
            )
            for option in one.options
        ]
        groups.append(Group(one.name, tuple(candidates)))
    return Problem(tuple(groups), limits.minimize, dict(limits.limits), tuple(scaled))


def loses_needlessly(problem: Problem, solution: Solution, limits: Limits) -> bool:
    """Whether a loss is in the way: it is what is minimized, or it limits what is."""
    lost = solution.totals["loss"] > limits.within
    return lost and (problem.minimize == "loss" or "loss" in solution.binding)


def refuse_measured_slower(
    sites: Sequence[Sites], learned: Corrections, seen: Sequence[Observation]
) -> None:
    """Take out the options whose kernels lost time when they were measured."""
    slower = {(path, one.formats.get(path)) for one in seen for path in one.slower_layers}
    for one in sites:
        original = one.options[0]
        for option in list(one.options):
            now = learned.latency(option, original)
            lost = any(learned.savings.get(name, 1.0) < 0 for name in option.formats.values())
            lost = lost or not slower.isdisjoint(option.formats.items())
            if option.name != ORIGINAL and lost:
                one.options.remove(option)
                one.refuse_slower(option, "measured slower in the whole model", now)


def slower_where_chosen(
    sites: Sequence[Sites], problem: Problem, solution: Solution
) -> list[tuple[int, float]]:
    """Groups whose choice takes longer among the others than the original would, with its ms."""
    found = []
    for place, one in enumerate(sites):
        index = solution.choice[place]
        candidate, original = (problem.groups[place].candidates[i] for i in (index, 0))
        taken = [pair for pair in problem.pairs_of(place) if pair.is_taken(solution.choice)]
        now = candidate.amount("latency") + sum(pair.amount("latency") for pair in taken)
        before = original.amount("latency")
        if one.options[index].border_ms and now > before * (1 + _SAME_TIME):
            found.append((place, now))
    return found
