"""Orders made by a rule, forwards or backwards: fast, none proves anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mopt.passes.schedule._order_problem import OrderProblem, Run


def candidates(problem: OrderProblem) -> Iterator[tuple[str, list[int]]]:
    """Named orders; the present one comes first."""
    yield "input", list(range(problem.count))
    yield "least-peak-first", least_peak_first(problem)
    yield "least-peak-last", least_peak_last(problem)
    sizes = [sum(problem.sizes[s] for s in made) for made in problem.makes]
    yield "depth-first", depth_first(problem, lambda v: v)
    yield "depth-first-large", depth_first(problem, lambda v: -sizes[v])
    yield "depth-first-small", depth_first(problem, lambda v: sizes[v])


def least_peak_first(problem: OrderProblem) -> list[int]:
    """Always the operator that keeps the peak, and of those the one that leaves least alive.

    Costs of waiting operators are kept and renewed where a storage they touch has fewer readers
    left: thousands of waiting ones stay cheap.
    """
    run = Run(problem)
    waiting_for = [len(set(earlier)) for earlier in problem.before]
    ready = {v: run.cost(v) for v in range(problem.count) if not waiting_for[v]}
    order: list[int] = []
    while ready:
        room = run.peak - run.live
        v = min(ready, key=lambda v: (max(ready[v][0], room), ready[v][1], v))
        del ready[v]
        order.append(v)
        run.run(v)
        for s in problem.touches[v]:
            if run.left[s] == 1:
                for w in problem.touchers[s]:
                    if w in ready:
                        ready[w] = run.cost(w)
        for w in set(problem.after[v]):
            waiting_for[w] -= 1
            if not waiting_for[w]:
                ready[w] = run.cost(w)
    return order


def least_peak_last(problem: OrderProblem) -> list[int]:
    """The same from the end: what runs last is what needs least alive before it.

    Going backwards a storage begins to live with its last toucher and ends with its maker.
    """
    waiting_for = [len(set(later)) for later in problem.after]
    ready = {v for v in range(problem.count) if not waiting_for[v]}
    alive: set[int] = set(problem.kept)
    live = sum(problem.sizes[s] for s in alive)
    peak = live
    order: list[int] = []

    def cost(v: int) -> tuple[int, int, int]:
        new = sum(problem.sizes[s] for s in problem.touches[v] if s not in alive)
        made = sum(problem.sizes[s] for s in problem.makes[v])
        return max(peak, live + new + problem.needs(v)), new - made, -v

    while ready:
        v = min(ready, key=cost)
        peak = cost(v)[0]
        ready.remove(v)
        order.append(v)
        for s in problem.touches[v]:
            if s not in alive:
                alive.add(s)
                live += problem.sizes[s]
        for s in problem.makes[v]:
            live -= problem.sizes[s]
        for u in set(problem.before[v]):
            waiting_for[u] -= 1
            if not waiting_for[u]:
                ready.add(u)
    return order[::-1]


def depth_first(problem: OrderProblem, key: Callable[[int], int]) -> list[int]:
    """Everything an operator needs right before it, in the order of ``key``; ends first."""
    order: list[int] = []
    state = [0] * problem.count  # 0 new, 1 its needs are under way, 2 placed
    for end in (v for v in range(problem.count) if not problem.after[v]):
        stack = [end]
        while stack:
            v = stack[-1]
            if state[v] == 0:
                state[v] = 1
                needs = {u for u in problem.before[v] if state[u] == 0}
                stack.extend(sorted(needs, key=key, reverse=True))
                continue
            stack.pop()
            if state[v] == 1:
                state[v] = 2
                order.append(v)
    return order
