"""``mopt plan buffers.csv``: offsets for a table of buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mopt.cli._output import Column, Output
from mopt.cli._text import memory_size, plural, seconds
from mopt.errors import BudgetNotMet

if TYPE_CHECKING:
    from mopt.memory import MemoryPlan, MemoryProblem

# Buffers named in a message.
_SHOWN = 6


def plan_buffers(
    out: Output,
    source: str,
    capacity: int | None,
    output: str | None,
    time_limit: float,
    seed: int,
) -> None:
    """Read CSV, place, check, and write CSV if it fits."""
    from mopt.disk import check_writable
    from mopt.files import write_file_atomic
    from mopt.memory_check import require_legal
    from mopt.memory_csv import read_buffers, solution_csv
    from mopt.registry import find_placement

    problem = read_buffers(source, capacity)
    if output is not None:
        check_writable(output)
    out.doing = "planning"
    plan = find_placement()(problem, time_limit=time_limit, seed=seed)
    require_legal(problem, plan)
    if plan.fits and output is not None:
        write_file_atomic(output, solution_csv(problem, plan).encode())
    if out.as_json:
        written = output if plan.fits else None
        out.document({"source": source, "capacity": capacity, "output": written, **plan.to_data()})
    elif plan.fits:
        _show(out, source, problem, plan, output)
    if not plan.fits:
        raise _does_not_fit(problem, plan)


def _show(
    out: Output, source: str, problem: MemoryProblem, plan: MemoryPlan, output: str | None
) -> None:
    if not out.quiet:
        if out.verbose:
            columns = [Column("buffer"), *(Column(n, right=True) for n in _NUMBERS)]
            out.table(
                columns,
                [
                    [b.id, *map(str, (b.lower, b.upper, b.size, plan.offsets[b.id]))]
                    for b in problem.buffers
                ],
            )
            out.text()
        out.text(f"{source}: {plural(len(problem.buffers), 'buffer')}", bold=True)
        out.text(f"  peak     {_bytes(plan.peak)}")
        out.text(f"  bound    {_bytes(plan.lower_bound)}{_bound_source(plan)}")
        if problem.capacity is not None:
            out.text(f"  capacity {_bytes(problem.capacity)}")
        if plan.solver != "none":
            nodes = f", {plan.nodes:,} nodes" if plan.nodes else ""
            over = ", when time ran out" if plan.timed_out else ""
            out.text(f"  found    by {plan.solver}{nodes}, in {seconds(plan.seconds)}{over}")
    if plan.gap == 0:
        proof = "proved least"
    else:
        proof = f"at most {plan.gap:.2%} above the least"
    where = f", written to {output}" if output is not None else ""
    out.text(f"{plural(len(problem.buffers), 'buffer')} in {plan.peak:,} bytes, {proof}{where}")


_NUMBERS = ("lower", "upper", "size", "offset")


def _bytes(count: int) -> str:
    return f"{count:,} bytes" if count < 1024 else f"{count:,} bytes ({memory_size(count)})"


def _bound_source(plan: MemoryPlan) -> str:
    if plan.binding is None or plan.binding.bytes < plan.lower_bound:
        return ", proved by search"
    alive = plural(len(plan.binding.ids), "buffer")
    return f", {alive} alive in {_steps(plan)}" if plan.binding.ids else ""


def _steps(plan: MemoryPlan) -> str:
    assert plan.binding is not None
    lower, upper = plan.binding.lower, plan.binding.upper
    return f"step {lower}" if upper == lower + 1 else f"steps {lower} to {upper - 1}"


def _does_not_fit(problem: MemoryProblem, plan: MemoryPlan) -> BudgetNotMet:
    """Why, and which moment and buffers bind."""
    sizes = {b.id: b.size for b in problem.buffers}
    assert plan.binding is not None
    ids = sorted(plan.binding.ids, key=lambda name: -sizes[name])
    shown = ", ".join(f"{name} ({sizes[name]:,})" for name in ids[:_SHOWN])
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    moment = f"in {_steps(plan)}, {plan.binding.bytes:,} bytes are needed at once: {shown}{more}"
    if plan.status == "infeasible":
        capacity = f"{problem.capacity:,} bytes"
        if plan.binding.bytes == plan.lower_bound:
            return BudgetNotMet(
                f"the buffers do not fit into {capacity}: {moment}",
                code="does-not-fit",
                hint=f"pass --capacity {plan.lower_bound} or more, or shorten a lifetime",
            )
        return BudgetNotMet(
            f"no layout fits into {capacity}, proved by search: at least {plan.lower_bound:,} "
            f"bytes are needed. {moment[0].upper()}{moment[1:]}",
            code="does-not-fit",
            hint=f"the best layout found needs {plan.peak:,} bytes",
        )
    return BudgetNotMet(
        f"no layout within {problem.capacity:,} bytes was found in {seconds(plan.seconds)}, and "
        f"none was ruled out: the best one needs {plan.peak:,}. {moment[0].upper()}{moment[1:]}",
        code="no-layout-in-time",
        hint="raise --time-limit, or the capacity",
    )
