"""What no plan can go below, whatever it keeps or repeats."""

from __future__ import annotations

from mopt.recompute import OFFLOAD, RecomputeProblem


def least_peak(problem: RecomputeProblem) -> tuple[int, str]:
    """Bytes that some call needs in every plan, and that call's name.

    Besides a call's own operands these are the results so far and, in backward, what earlier
    backward calls made for later ones.
    """
    sizes, given = problem.sizes, problem.given
    best, name = problem.constant, ""
    held: dict[int, int] = {}
    for call in problem.forward:
        own = {s for s in (*call.reads, *call.makes) if s not in given} | set(held)
        need = problem.constant + sum(sizes[s] for s in own) + call.workspace
        if need > best:
            best, name = need, call.name
        held.update({s: sizes[s] for s in call.makes if s in problem.results})
    ends = {s: i for i, call in enumerate(problem.backward) for s in (*call.reads, *call.makes)}
    for index, call in enumerate(problem.backward):
        own = {s for s in (*call.reads, *call.makes) if s not in given} | set(held)
        need = problem.constant + sum(sizes[s] for s in own) + call.workspace
        if need > best:
            best, name = need, call.name
        for s in (*call.reads, *call.makes):
            if s in problem.maker or s in given:
                continue
            if s in problem.results or ends[s] > index:
                held[s] = sizes[s]
            else:
                held.pop(s, None)
    return best, name


def least_seconds(problem: RecomputeProblem, live: tuple[int, ...], budget: int) -> float:
    """Seconds that every plan within the budget repeats.

    At each backward call of the step that keeps everything, the bytes over the budget have to go,
    and what goes is made again at least once: a fractional knapsack by seconds per byte, each value
    in its cheapest way (values of one call share its seconds), besides what the link moves out in
    the time that the step takes anyway. ``live`` are the bytes of that step, call by call.
    """
    border = len(problem.forward)
    uses: dict[int, int] = {}
    for index, call in enumerate(problem.backward):
        for s in call.reads:
            uses[s] = index
    rates: dict[int, float] = {}
    for call in problem.forward:
        if call.again is None or call.form == OFFLOAD:
            continue
        values = [s for s in call.again.makes if s in uses and s not in problem.results]
        rate = call.again.seconds / max(1, sum(problem.sizes[s] for s in values))
        rates.update((s, min(rate, rates.get(s, rate))) for s in values)
    offers = sorted((rate, s) for s, rate in rates.items())
    out, free = _hidden(problem)
    best = 0.0
    for index, call in enumerate(problem.backward):
        excess: float = live[border + index] - budget
        if excess <= 0:
            continue
        excess -= free
        total = 0.0
        here = set(call.reads)
        for rate, s in offers:
            if excess <= 0:
                break
            # What this very call reads is there in any plan.
            if uses[s] < index or s in here:
                continue
            # While a byte is made again, the link moves some more out.
            gain = 1 + rate * out
            take = min(problem.sizes[s], excess / gain)
            total += take * rate
            excess -= take * gain
        if out and excess > 0:
            total += excess / out
        best = max(best, total)
    return best


def _hidden(problem: RecomputeProblem) -> tuple[float, float]:
    """Bytes a second that the link moves out and back, and how many the plain step hides."""
    if problem.link is None:
        return 0.0, 0.0
    rate = 1 / (1 / problem.link.write + 1 / problem.link.read)
    return rate, rate * problem.seconds
