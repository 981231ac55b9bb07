"""Layouts made lower window by window stay layouts and get lower."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mopt.memory import MemoryPlan, MemoryProblem, Status
from mopt.memory_check import require_legal
from mopt.passes.schedule import _greedy
from mopt.passes.schedule._instance import Instance
from mopt.passes.schedule._run import Clock, Guide
from mopt.passes.schedule._windows import Windows
from tests.passes.schedule.problems import cut_rectangle


def guide(instance: Instance, number: int) -> Guide:
    """Long lives first, or any order."""
    lives = [item.spans[0][0] - item.spans[-1][1] for item in instance.items]
    noise = np.random.default_rng(number).normal(0, 2 * bool(number), len(lives))
    rank = np.argsort(np.argsort(np.array(lives) + noise, kind="stable"))
    return Guide([int(k) for k in rank], 0.0)


@pytest.mark.parametrize("fix", [False, True])
def test_the_top_of_a_greedy_layout_comes_down(fix: bool) -> None:
    problem = cut_rectangle(90, seed=5)
    storages = list(problem.storages)
    rule = next(iter(_greedy.rules(storages)))
    offsets = _greedy.place(storages, rule.order, rule.best_fit)
    before = _greedy.top_of(storages, offsets)
    if fix:
        # What lies on the ground stays there.
        buffers = tuple(
            replace(b, offset=0) if offsets[b.id] == 0 else b for b in problem.buffers
        )  # fmt: skip
        problem = MemoryProblem(buffers)
        storages = list(problem.storages)
    windows = Windows(storages, Clock(60.0), np.random.default_rng(0), guide)
    floor = problem.peak_load().bytes
    found = windows.lower(offsets, floor)
    top = _greedy.top_of(storages, found)
    require_legal(problem, MemoryPlan(found, top, floor, Status.FEASIBLE, "windows"))
    assert floor <= top < before
    assert windows.lower(found, top) == found
