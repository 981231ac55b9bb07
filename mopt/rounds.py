"""Closing the loop: what was chosen is built and measured, and chosen again by what was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mopt.budget import Budget
from mopt.choice import Observation
from mopt.cost import ModelCost
from mopt.lowering import Artifact
from mopt.memory_moment import fullest_moment
from mopt.program import Program
from mopt.proof import Parity, Quality, Timing

ROUNDS = 3
# A choice that keeps more quality than this share of what it may lose is asked to use it.
_UNUSED = 0.9


@dataclass
class Attempt:
    """A result, lowered, checked and measured.

    ``cost`` and ``before`` are estimates of a run of it and of the uncompressed model. They stand
    in for times where nothing could be timed. ``slower_layers`` has the ms before and after of
    layers that take clearly longer than they did.
    """

    result: Program
    artifact: Artifact
    parity: Parity
    quality: Quality
    timing: Timing | None
    cost: ModelCost | None = None
    before: ModelCost | None = None
    slower_layers: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def values(self, baseline: Artifact) -> dict[str, tuple[float | None, float | None]]:
        """What a budget may limit: the value, measured if it was, and the uncompressed model's."""
        timed = self.timing.comparison if self.timing else None
        kept = self.quality.kept()
        guess = (self.cost.milliseconds, self.before.milliseconds) if (
            self.cost and self.before
        ) else (None, None)  # fmt: skip
        return {
            "size": (self.artifact.size_bytes, baseline.size_bytes),
            "latency": (timed.candidate.median_ms, timed.reference.median_ms) if timed else guess,
            "memory": (timed.candidate.peak_bytes, timed.reference.peak_bytes)
            if timed
            else (None, None),
            "quality": (kept if kept is not None else self.quality.drift.cosine, 1.0),
            "energy": (
                self.cost.cost.energy_mj if self.cost else None,
                self.before.cost.energy_mj if self.before else None,
            ),
        }

    def missed(self, budget: Budget, baseline: Artifact) -> list[str]:
        """The constraints that are not met, each with what was found."""
        missed = []
        values = self.values(baseline)
        for constraint in budget.constraints:
            value, base = values[constraint.what]
            if value is None or base is None:
                missed.append(f"{constraint.text} (not measured)")
            elif not constraint.is_met(value, base):
                guessed = constraint.what == "energy" or (
                    constraint.what == "latency" and self.timing is None
                )
                word = "estimated" if guessed else "found"
                why = self._plan_needs() if constraint.what == "memory" else ""
                missed.append(
                    f"{constraint.text} ({word} {value:.6g}, limit {constraint.limit(base):.6g})"
                    f"{why}"
                )
        return missed

    def _plan_needs(self) -> str:
        """Which moment of the memory plan binds, with its buffers; empty without a plan."""
        plan = self.result.plan.get("memory")
        moment = fullest_moment(plan) if plan else None
        if plan is None or moment is None:
            return ""
        least = "no order and no layout needs less"
        if plan["gap"]:
            least = f"at most {100 * plan['gap']:.2g} % more than any order and layout"
        return f"; beside the weights the plan needs {moment.text()}; {least}"

    def excess(self, budget: Budget, baseline: Artifact) -> float:
        """How far the measured values are outside, relative to the limits; 0 is inside."""
        total = 0.0
        values = self.values(baseline)
        for constraint in budget.constraints:
            value, base = values[constraint.what]
            if value is not None and base is not None:
                limit = constraint.limit(base)
                over = limit - value if constraint.what == "quality" else value - limit
                total += max(over, 0.0) / abs(limit)
        return total

    @property
    def is_slower(self) -> bool:
        """Whether it was measured to be slower than uncompressed, beyond noise."""
        if self.timing is None:
            return False
        found = self.timing.comparison
        return found.is_different and found.ratio > 1

    @property
    def formats(self) -> dict[str, str]:
        """The formats by layer path, of all parts."""
        return formats_of(self.result)

    def observation(self, baseline: Artifact) -> Observation:
        """What the chooser is told about it."""
        values = self.values(baseline)
        measured = {what: found[0] for what, found in values.items() if found[0] is not None}
        before = {what: found[1] for what, found in values.items() if found[1] is not None}
        measured["loss"] = 1.0 - measured.pop("quality")
        band = None
        if self.timing is None:
            measured.pop("latency", None)
        elif before.get("latency"):
            found = self.timing.comparison
            # The median of the pairs' ratios is steadier than the ratio of two medians.
            measured["latency"] = before["latency"] * found.ratio
            band = (found.low, found.high)
        estimated = self.result.plan.get("choice", {}).get("estimated", {})
        return Observation(
            self.formats, estimated, measured, before, self.is_slower, band,
            frozenset(self.slower_layers),
        )  # fmt: skip


def formats_of(program: Program) -> dict[str, str]:
    """What was chosen, over all parts: formats by layer; ``width of`` and ``input of`` layers."""
    found: dict[str, str] = {}
    for part in program.parts().values():
        found.update(part.plan.get("formats", {}))
        for width in part.plan.get("choice", {}).get("widths", ()):
            if width["chosen"] != "original":
                found[f"width of {width['path']}"] = width["chosen"]
        for path in part.plan.get("choice", {}).get("products", ()):
            found[f"input of {path}"] = "scaled"
    return found


def close_loop(
    choose: Callable[[tuple[Observation, ...]], Program],
    build: Callable[[Program], Attempt],
    uncompressed: Callable[[], Program],
    budget: Budget,
    baseline: Artifact,
    *,
    allow_slower: bool,
    another: Callable[[], bool] = lambda: True,
) -> tuple[Attempt, list[dict[str, Any]]]:
    """The best attempt of at most three rounds, and the story of all of them.

    A round ends the search when it meets the budget, is not slower than uncompressed, has no layer
    that is, uses the quality it may lose and no more than an estimate that turned out too high made
    it lose, or when the same would be chosen again. If every
    round was slower, or lost too much where only quality is limited, nothing is compressed. The
    best is the one inside the budget with the least of what is minimized; if there is none, the one
    nearest to it. So a slower layer may stay, where the model is faster with it: between neighbours
    in 8 bits it saves them their conversions. ``another`` says before every round but the first
    whether there is time for it.
    """
    attempts: list[Attempt] = []
    story: list[dict[str, Any]] = []
    seen: tuple[Observation, ...] = ()
    for _ in range(ROUNDS):
        if attempts and not another():
            break
        result = choose(seen)
        if any(attempt.formats == formats_of(result) for attempt in attempts):
            break
        attempt = build(result)
        attempts.append(attempt)
        missed = attempt.missed(budget, baseline)
        observed = attempt.observation(baseline)
        seen = (*seen, observed)
        story.append({
            "estimated": dict(observed.estimated),
            "measured": dict(observed.measured),
            "missed": missed,
            "slower": attempt.is_slower,
            "layers": sum(" of " not in name for name in attempt.formats),
            "slower_layers": {path: list(ms) for path, ms in attempt.slower_layers.items()},
        })  # fmt: skip
        slower = (attempt.is_slower or bool(attempt.slower_layers)) and not allow_slower
        wasted = _wastes_quality(attempt, budget) or _gave_up_quality(attempt)
        if not missed and not slower and not wasted:
            break
    ranked = sorted(attempts, key=lambda a: _rank(a, budget, baseline, allow_slower))
    best = ranked[0]
    why = None
    if best.is_slower and not allow_slower:
        why = "every choice was slower than the uncompressed model when measured"
    elif {c.what for c in budget.constraints} == {"quality"} and best.missed(budget, baseline):
        why = "every choice lost more quality than allowed when measured"
    if why is not None:
        plain = uncompressed()
        choice = best.result.plan.get("choice", {})
        kept = {"chosen": "original", "option": "original", "why": why}
        layers = {path: {**row, **kept} for path, row in choice.get("layers", {}).items()}
        plain.plan["choice"] = {**choice, "kept_all": why, "layers": layers}
        best = build(plain)
    return best, story


def _wastes_quality(attempt: Attempt, budget: Budget) -> bool:
    """Whether quality binds the choice although the measured model keeps far more of it."""
    limit = budget.get("quality")
    if limit is None or "loss" not in attempt.result.plan.get("choice", {}).get("binding", ()):
        return False
    kept = attempt.quality.kept()
    lost = 1.0 - (kept if kept is not None else attempt.quality.drift.cosine)
    return lost < _UNUSED * (1.0 - limit.limit(1.0))


def _gave_up_quality(attempt: Attempt) -> bool:
    """Whether the budget was thought to be out of reach, so that loss counted for nothing."""
    choice = attempt.result.plan.get("choice", {})
    return choice.get("minimize") == "loss" and bool(choice.get("excess"))


def _rank(
    attempt: Attempt, budget: Budget, baseline: Artifact, allow_slower: bool
) -> tuple[bool, float, float, int]:
    values = attempt.values(baseline)
    what = attempt.result.plan.get("choice", {}).get("minimize", "loss")
    if what == "loss":
        score = -(values["quality"][0] or 0.0)
    elif what == "latency" and attempt.timing is not None:
        score = attempt.timing.comparison.ratio
    else:
        score = float(attempt.artifact.size_bytes)
    slower = attempt.is_slower and not allow_slower
    layers = 0 if allow_slower else len(attempt.slower_layers)
    return slower, attempt.excess(budget, baseline), score, layers


def nearest_point(attempt: Attempt, baseline: Artifact) -> str:
    """What the best attempt measured, in one line."""
    values = attempt.values(baseline)
    shown = {"size": "B", "latency": "ms", "memory": "B", "energy": "mJ", "quality": "x"}
    return ", ".join(
        f"{what} {values[what][0]:.6g} {unit}"
        for what, unit in shown.items()
        if values[what][0] is not None
    )


def choice_data(attempt: Attempt, story: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the report says of a choice: prices, rounds, errors of the estimates; {} without one."""
    choice = attempt.result.plan.get("choice")
    if choice is None:
        return {}
    return {
        "choice": {key: value for key, value in choice.items() if key != "layers"},
        "prices": choice["prices"],
        "rounds": list(story),
        "estimate_error": estimate_error(attempt, story),
    }


def estimate_error(attempt: Attempt, story: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Relative error of the last estimates: estimated over measured, minus one."""
    if not story:
        return {}
    last = next((s for s in story if s["layers"] == len(attempt.formats)), story[-1])
    guess, found = last["estimated"], last["measured"]
    return {
        what: guess[what] / found[what] - 1
        for what in ("size", "latency", "memory", "energy", "loss")
        if guess.get(what) is not None and found.get(what)
    }
