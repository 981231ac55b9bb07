"""Why a choice is as it is, as plain data for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mopt.passes.choose._limits import Corrections, Limits
from mopt.passes.choose._options import ORIGINAL, Option, Sites
from mopt.passes.choose._program import Problem, Solution


def explain(
    sites: Sequence[Sites],
    left: Mapping[str, str],
    problem: Problem,
    solution: Solution,
    limits: Limits,
    learned: Corrections,
) -> dict[str, Any]:
    """The status, the prices and totals of a solution, and every layer's candidates."""
    totals = {
        quantity: solution.totals[quantity] + limits.fixed.get(quantity, 0.0)
        for quantity in (*limits.fixed, "loss")
    }
    raw = [one.options[index] for one, index in zip(sites, solution.choice, strict=True)]
    layers = {}
    for place, one in enumerate(sites):
        layers.update(_layers(place, one, problem, solution, learned))
    for path, reason in left.items():
        layers[path] = {"chosen": ORIGINAL, "group": [path], "why": reason, "candidates": []}
    return {
        "minimize": problem.minimize,
        "status": solution.status,
        "objective": solution.objective,
        "bound": _finite(solution.bound),
        "gap": _finite(solution.gap),
        "seconds": round(solution.seconds, 3),
        "prices": dict(solution.prices),
        "binding": list(solution.binding),
        "limits": {q: v + limits.fixed.get(q, 0.0) for q, v in problem.limits.items()},
        "excess": dict(solution.excess),
        "least": {q: v + limits.fixed.get(q, 0.0) for q, v in solution.alone.items()},
        "least_if_slower": {"size": _least_size(sites) + limits.fixed["size"]},
        "pairs": len(problem.pairs),
        "checks": dict(solution.checks),
        "estimated": {
            **totals,
            "whole_latency": limits.whole_ms,
            "raw_loss": sum(option.loss for option in raw),
            "raw_latency": sum(option.latency_ms for option in raw)
            + limits.fixed.get("latency", 0.0),
        },
        "corrections": {
            "loss": learned.loss,
            "size": learned.size,
            "savings": dict(learned.savings),
        },
        "layers": layers,
    }


def _least_size(sites: Sequence[Sites]) -> float:
    """The smallest sum of bytes, with the formats that were refused for their time."""
    return sum(min(o.size_bytes for o in (*one.options, *one.slower)) for one in sites)


def _layers(
    place: int, one: Sites, problem: Problem, solution: Solution, learned: Corrections
) -> dict[str, Any]:
    chosen = solution.choice[place]
    worth = [_reduced(problem, solution, place, c) for c in range(len(one.options))]
    others = sorted((w, c) for c, w in enumerate(worth) if c != chosen)
    runner_up = others[0][1] if others else None
    rows = [
        _row(option, learned.latency(option, one.options[0]), learned.loss)
        for option in one.options
    ]
    refused = [{"format": name, "reason": reason} for name, reason in one.refused.items()]
    return {
        layer.path: {
            "chosen": one.options[chosen].formats.get(layer.path, ORIGINAL),
            "option": one.options[chosen].name,
            "group": [member.path for member in one.layers],
            "runner_up": one.options[runner_up].name if runner_up is not None else None,
            "runner_up_costs": others[0][0] - worth[chosen] if others else None,
            "candidates": rows + refused,
            "why": _why(one, chosen, runner_up, problem),
        }
        for layer in one.layers
    }


def _row(option: Option, latency: float, factor: float) -> dict[str, Any]:
    return {
        "format": option.name,
        "size_bytes": option.size_bytes,
        "latency_ms": latency,
        "latency_source": option.latency_source,
        "loss": factor * option.loss,
        "loss_source": option.loss_source,
    }


def _reduced(problem: Problem, solution: Solution, place: int, index: int) -> float:
    """The objective of a candidate with everything else at the price of its budget."""
    candidate = problem.groups[place].candidates[index]
    return candidate.amount(problem.minimize) + sum(
        price * candidate.amount(quantity) for quantity, price in solution.prices.items()
    )


def _why(one: Sites, chosen: int, runner_up: int | None, problem: Problem) -> str:
    if len(one.options) == 1:
        return "no other format is for it on this target"
    assert runner_up is not None
    mine, other = one.options[chosen], one.options[runner_up]
    limited = ", ".join(sorted(problem.limits)) or "nothing"
    return (
        f"the least {problem.minimize} with {limited} limited; next is {other.name} "
        f"({_signed(other.size_bytes - mine.size_bytes)} bytes, "
        f"{_signed(other.latency_ms - mine.latency_ms)} ms, {_signed(other.loss - mine.loss)} loss)"
    )


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _finite(value: float) -> float | None:
    return value if abs(value) < 1e300 else None
