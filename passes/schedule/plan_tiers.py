"""plan-tiers: what lies in a fast memory of fixed size when, and what moves to a slow one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from mopt.errors import UsageError
from mopt.memory import Status
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, option, register_pass
from mopt.passes.schedule._liveness import Liveness, liveness_of, reorder
from mopt.passes.schedule._tier_cache import least_recently_used
from mopt.passes.schedule._tier_device import Tiers, tiers_of
from mopt.passes.schedule._tier_model import TierModel, tier_problem
from mopt.passes.schedule._tier_prefetch import read_ahead
from mopt.passes.schedule._tier_search import solve_tiers
from mopt.program import Program
from mopt.recompute import parse_bytes
from mopt.storages import trace_storages
from mopt.tier_check import require_sound
from mopt.tier_times import run_plan
from mopt.tiers import TierPlan

# A window for streaming is at most this part of the fast memory.
_WINDOWS = 64
# Shares of the fast memory that residency may use where time counts; the rest is for reading ahead.
_SHARES = (1.0, 0.9, 0.75, 0.5)


@register_pass("plan-tiers", numerics=Numerics.EXACT)
@dataclass(frozen=True, kw_only=True)
class PlanTiers(Pass):
    """Plan a fast memory of fixed size beside a slow one: order, residency, moves and offsets.

    ## When to use
    Last, for a device whose fast memory does not hold the model: on-chip memory beside DRAM or
    flash, a GPU beside its host. The plan is data for the device's runtime; nothing here runs it.

    ## Accuracy
    Exact: the same calls on the same values in an order that gives the same results.

    ## Limits
    Sizes are those of the example inputs. Elementwise calls are taken to be fused into what makes
    their input. An operator reads each operand once, as a whole or in part where it lies, and
    streams the rest; of the factors of a product one has to be there as a whole.

    ## Example
    With room for one of two results that are read later, the one whose bytes times visits are fewer
    is written out and read again; the plan states how many bytes that is and that none needs fewer.
    """

    fast_memory: str = option("", help="8MiB, or 25% of all bytes; empty: the device's")
    weights: bool = option(True, help="weights start in the slow memory, too")
    minimise: str = option(
        "bytes", choices=("bytes", "time"), help="bytes moved, or estimated time"
    )
    pieces: int = option(8, min=1, max=64, help="pieces a value may stay in")
    fuse: bool = option(True, help="elementwise calls belong to what makes their input")
    seconds: float = option(30.0, min=0.1, help="time for the search")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Reorder the graph and store the plan in ``program.plan["tiers"]``."""
        tiers = tiers_of(ctx.device)
        live = liveness_of(program, trace_storages(program))
        model = tier_problem(
            live, self._capacity(tiers), window=lambda most: tiers.link.chunk(most // _WINDOWS),
            most_pieces=self.pieces, weights=self.weights, writable=tiers.writable, fuse=self.fuse,
            speeds=tiers.speeds,
        )  # fmt: skip
        plan = self._plan(model, tiers, ctx.seed)
        require_sound(model.problem, plan)
        number = {step.id: n for n, step in enumerate(model.problem.steps)}
        groups = [number[name] for name in plan.order if number[name] < len(model.calls)]
        order = [v for n in groups for v in model.calls[n]]
        moved = groups != sorted(groups)
        if moved:
            reorder(live, order)
        data = _data(live, model, plan, tiers)
        program.plan["tiers"] = data
        told = ("fast_bytes", "moved_bytes", "compulsory_bytes", "extra_bytes", "extra_bound_bytes")
        return PassResult(changed=moved, stats={key: data[key] for key in told})

    def _capacity(self, tiers: Tiers) -> Any:
        """The fast memory in bytes, from the bytes that everything takes."""
        if not self.fast_memory:
            if tiers.capacity is None:
                raise UsageError(
                    "plan-tiers needs the size of the fast memory",
                    code="fast-memory",
                    hint="set fast_memory to bytes such as 8MiB or a share such as 25%, "
                    "or name a device",
                )
            return lambda needs: tiers.capacity
        amount = parse_bytes(self.fast_memory, "fast_memory")
        return lambda needs: int(amount * needs) if isinstance(amount, float) else amount

    def _plan(self, model: TierModel, tiers: Tiers, seed: int) -> TierPlan:
        problem = model.problem
        best = solve_tiers(problem, time_limit=self.seconds, seed=seed)
        found = read_ahead(problem, best, tiers.link)
        if self.minimise == "bytes":
            return found
        for share in _SHARES[1:]:
            room = int(problem.fast_bytes * share) // problem.alignment * problem.alignment
            least = max(problem.least_bytes(step) for step in problem.steps)
            smaller = replace(problem, fast_bytes=max(room, least))
            trial = solve_tiers(smaller, time_limit=self.seconds / 4, seed=seed)
            # A proof about less room says nothing about all of it.
            proved = trial.moved_bytes <= best.lower_bound
            trial = replace(
                trial, lower_bound=best.lower_bound,
                status=Status.OPTIMAL if proved else Status.FEASIBLE,
            )  # fmt: skip
            trial = read_ahead(problem, trial, tiers.link)
            seconds = run_plan(problem, trial, tiers.link).seconds
            if seconds < run_plan(problem, found, tiers.link).seconds:
                found = trial
        return found


def _data(live: Liveness, model: TierModel, plan: TierPlan, tiers: Tiers) -> dict[str, Any]:
    problem = model.problem
    times = run_plan(problem, plan, tiers.link)
    cache = least_recently_used(problem)
    knowing = least_recently_used(problem, drops_dead=True)
    number = {step.id: n for n, step in enumerate(problem.steps)}
    return {
        "schema": 1,
        "fast": tiers.fast,
        "slow": tiers.slow,
        "fast_bytes": problem.fast_bytes,
        "needs_bytes": model.needs_bytes,
        "window_bytes": problem.window_bytes,
        "least_recently_used_extra_bytes": cache - problem.compulsory_bytes,
        "least_recently_used_without_dead_extra_bytes": knowing - problem.compulsory_bytes,
        "link": asdict(tiers.link),
        "estimated": {
            "seconds": times.seconds,
            "compute_seconds": times.compute_seconds,
            "link_seconds": times.link_seconds,
            "stall_seconds": times.stall_seconds,
        },
        **plan.to_data(),
        "values": [asdict(value) for value in problem.values],
        "steps": [
            {
                "step": name,
                "calls": [live.calls[v].name for v in model.calls[number[name]]]
                if number[name] < len(model.calls) else [],
                "seconds": problem.step[name].seconds,
            }
            for name in plan.order
        ],
    }  # fmt: skip
