"""The memory plan of a program: an order of its calls, a place for what they make, what it proves.

The plan is plain data, kept in ``Program.plan["memory"]`` and written to ``plan.json``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopt.memory import Buffer, MemoryPlan, MemoryProblem
from mopt.passes.schedule._liveness import Liveness, liveness_of, reorder
from mopt.passes.schedule._order import OrderResult, best_order
from mopt.passes.schedule._split import Beside, lifetimes, split
from mopt.passes.schedule.offsets import place
from mopt.program import Program, is_dynamic
from mopt.storages import CallFacts, Origin, StorageTrace, graph_key, trace_storages

SCHEMA = 1
# What PyTorch's CPU allocator aligns to, and what kernels pick their code path by.
ALIGNMENT = 64


@dataclass(frozen=True)
class ProgramPlan:
    """A plan with the problem it solves; ``data`` is what is stored, ``moved`` whether the order
    of the calls changed."""

    problem: MemoryProblem
    layout: MemoryPlan
    order: OrderResult
    data: dict[str, Any]
    moved: bool


def plan_program(
    program: Program,
    *,
    recorded: tuple[StorageTrace, Mapping[str, CallFacts]] | None = None,
    backend: str = "",
    alignment: int = ALIGNMENT,
    time_limit: float = 30.0,
    seed: int = 0,
    keep_order: bool = False,
) -> ProgramPlan:
    """Put the calls of ``program`` into the order with the least peak found, and place the results.

    ``recorded`` is what a backend learned by running the program. Without it the plan is for a
    device where calls need no workspace, elementwise ones may write where an input lies, and
    inputs and outputs lie in the arena, too. With dynamic shapes the plan holds for the sizes of
    the example inputs. ``time_limit`` is in seconds, for order and offsets together.
    """
    started = time.monotonic()
    trace, facts = recorded or (trace_storages(program), None)
    live = liveness_of(program, trace, facts)
    found = best_order(live.problem, 0.0 if keep_order else time_limit / 2)
    order = list(range(live.problem.count)) if keep_order else found.order
    moved = order != sorted(order)
    if moved:
        reorder(live, order)
    beside = _beside(live, order, facts)
    problem = _memory_problem(live, order, beside, alignment, with_ends=facts is None)
    rest = max(time_limit - (time.monotonic() - started), 1.0)
    layout = place(problem, time_limit=rest, seed=seed)
    data = _data(live, order, beside, problem, layout, found, backend, facts or {})
    data["seconds"] = round(time.monotonic() - started, 3)
    return ProgramPlan(problem, layout, found, data, moved)


def _beside(live: Liveness, order: list[int], facts: Mapping[str, CallFacts] | None) -> Beside:
    if facts is None:
        return Beside(frozenset(), 0)
    known = [facts.get(node.name, CallFacts()) for node in live.calls]
    never = set(live.problem.kept)
    for v, fact in enumerate(known):
        if not fact.call:
            never.update(live.problem.makes[v])
    return split(
        live.problem,
        order,
        never_placed=frozenset(never),
        placed_workspace=[f.placed_bytes if f.call else None for f in known],
        plain_workspace=[f.plain_bytes for f in known],
    )


def _memory_problem(
    live: Liveness, order: list[int], beside: Beside, alignment: int, *, with_ends: bool
) -> MemoryProblem:
    times = lifetimes(live.problem, order, beside.storages)
    buffers = []
    if with_ends:
        buffers += _input_buffers(live, order, alignment)
    for s in sorted(times.lower, key=lambda s: (times.lower[s], s)):
        if s in beside.storages:
            continue
        source = times.taken.get(s)
        buffers.append(
            Buffer(
                buffer_id(live, s), times.lower[s], times.upper[s],
                live.trace.storages[s].bytes, alignment,
                alias=None if source is None else buffer_id(live, source),
            )
        )  # fmt: skip
    return MemoryProblem(tuple(buffers), order=tuple(live.calls[v].name for v in order))


def _input_buffers(live: Liveness, order: list[int], alignment: int) -> list[Buffer]:
    """Inputs lie in the arena from the start until their last reader."""
    last = dict.fromkeys(range(len(live.trace.storages)), 0)
    for position, v in enumerate(order):
        for s in live.trace.touched(live.calls[v]):
            last[s] = position
    output = live.program.graph.output_node()
    for s in {s for source in output.all_input_nodes for s in live.trace.of(source)}:
        last[s] = max(len(order) - 1, 0)
    return [
        Buffer(buffer_id(live, s), 0, last[s] + 1, info.bytes, alignment)
        for s, info in enumerate(live.trace.storages)
        if info.origin is Origin.INPUT
    ]


def buffer_id(live: Liveness, storage: int) -> str:
    """The name of the node that made a storage, numbered where it made several."""
    maker = live.trace.storages[storage].maker
    number = sum(info.maker == maker for info in live.trace.storages[:storage])
    return f"{maker}.{number}" if number else maker


def _data(
    live: Liveness,
    order: list[int],
    beside: Beside,
    problem: MemoryProblem,
    layout: MemoryPlan,
    found: OrderResult,
    backend: str,
    facts: Mapping[str, CallFacts],
) -> dict[str, Any]:
    peak = layout.peak + beside.peak
    bound = min(found.lower_bound, peak)
    return {
        "schema": SCHEMA,
        "backend": backend,
        # Workspaces were measured with as many.
        "threads": torch.get_num_threads() if facts else None,
        "key": graph_key(live.program),
        "peak_bytes": peak,
        "arena_bytes": layout.peak,
        "beside_bytes": beside.peak,
        "lower_bound_bytes": bound,
        "input_order_bytes": found.input_peak,
        "gap": round(peak / bound - 1, 6) if bound else 0.0,
        "order_from": found.rule,
        "offsets_from": layout.solver,
        "timed_out": found.timed_out or layout.timed_out,
        "dynamic": any(is_dynamic(n) for n in live.program.graph.nodes if n.op == "placeholder"),
        "inputs": [
            n.name if isinstance(n.meta.get("val"), Tensor) else None
            for n in live.program.graph.nodes if n.op == "placeholder"
        ],
        "steps": _step_rows(live, order, beside, facts),
        "buffers": _buffer_rows(live, order, beside, problem, layout),
        "values": {
            node.name: [
                {
                    "buffer": buffer_id(live, view.storage),
                    "shape": list(view.shape),
                    "stride": list(view.stride),
                    "first": view.first,
                    "dtype": str(view.dtype).removeprefix("torch."),
                }
                for view in live.trace.views[node.name]
            ]
            for node in live.program.graph.nodes
            if node.op != "get_attr" and isinstance(node.meta.get("val"), Tensor)
            and node.name in live.trace.views
        },
    }  # fmt: skip


def _step_rows(
    live: Liveness, order: list[int], beside: Beside, facts: Mapping[str, CallFacts]
) -> list[dict[str, Any]]:
    """The calls in order, each with the way it is run in given memory ("" where it is not)."""
    taken = lifetimes(live.problem, order, beside.storages).taken
    rows = []
    for v in order:
        fact = facts.get(live.calls[v].name, CallFacts())
        made = live.problem.makes[v]
        is_free = set(made) <= beside.storages and not set(made) & set(taken)
        is_plain = not fact.call or (is_free and fact.plain_bytes <= fact.placed_bytes)
        rows.append({
            "node": live.calls[v].name, "call": "" if is_plain else fact.call,
            "workspace_bytes": fact.plain_bytes if is_plain else fact.placed_bytes,
        })  # fmt: skip
    return rows


def _buffer_rows(
    live: Liveness, order: list[int], beside: Beside, problem: MemoryProblem, layout: MemoryPlan
) -> list[dict[str, Any]]:
    times = lifetimes(live.problem, order, beside.storages)
    rows = [
        {
            "id": b.id, "where": "arena", "offset": layout.offsets[b.id], "bytes": b.size,
            "lower": b.lower, "upper": b.upper, "shares": b.alias,
        }
        for b in problem.buffers
    ]  # fmt: skip
    rows += [
        {
            "id": buffer_id(live, s), "where": "beside", "offset": None,
            "bytes": live.trace.storages[s].bytes,
            "lower": times.lower[s], "upper": times.upper[s],
            "shares": buffer_id(live, times.taken[s]) if s in times.taken else None,
        }
        for s in sorted(beside.storages & set(times.lower))
    ]  # fmt: skip
    return rows
