"""What no plan can go below, whatever it keeps or repeats."""

from __future__ import annotations

from mopt.recompute import RecomputeProblem


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
    and what goes is computed again at least once: a fractional knapsack by seconds per byte
    (values of one call share its seconds). ``live`` are the bytes of that step, call by call.
    """
    border = len(problem.forward)
    uses: dict[int, int] = {}
    for index, call in enumerate(problem.backward):
        for s in call.reads:
            uses[s] = index
    offers: list[tuple[float, int, int, frozenset[int]]] = []
    for index, call in enumerate(problem.forward):
        if call.again is None:
            continue
        values = [s for s in call.again.makes if s in uses and s not in problem.results]
        if values:
            size = sum(problem.sizes[s] for s in values)
            offers.append((call.again.seconds / max(size, 1), size, index, frozenset(values)))
    offers.sort()
    best = 0.0
    for index, call in enumerate(problem.backward):
        excess = live[border + index] - budget
        if excess <= 0:
            continue
        total = 0.0
        here = set(call.reads)
        for rate, _, _, group in offers:
            # What this very call reads is there in any plan.
            room = sum(problem.sizes[s] for s in group if uses[s] >= index and s not in here)
            take = min(room, excess)
            total += take * rate
            excess -= take
            if excess <= 0:
                break
        best = max(best, total)
    return best
