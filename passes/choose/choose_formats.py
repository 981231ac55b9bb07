"""Choose the format of every layer together, under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

from mopt.budget import Budget
from mopt.choice import Baseline
from mopt.formats import find_format
from mopt.machine import trim_heap
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, option, register_pass
from mopt.passes.choose._explain import explain
from mopt.passes.choose._limits import (
    Corrections,
    Limits,
    allows_loss,
    asks_for_size,
    loses_needlessly,
    make_problem,
    read_limits,
    refuse_measured_slower,
    slower_where_chosen,
)
from mopt.passes.choose._neighbours import (
    Interaction,
    find_neighbours,
    interactions,
    merged,
    placed,
    saved_times,
)
from mopt.passes.choose._options import (
    ORIGINAL,
    Sites,
    fill_options,
    format_names,
    read_sites,
    requests,
)
from mopt.passes.choose._place import is_fitted, place
from mopt.passes.choose._products import add_scaled, adopt, scaled_layers, with_products
from mopt.passes.choose._program import Problem, Solution
from mopt.passes.choose._sensitivity import Losses, enough_batches, estimate, gives_logits
from mopt.passes.choose._solver import settle, solve
from mopt.passes.choose._widths import (
    Crossing,
    Widths,
    crossed,
    fill_losses,
    find_widths,
    price,
)
from mopt.program import Program

# Groups in which fitted codes are compared with rounding to nearest, per format.
_FITTED_SAMPLE = 3


@register_pass("choose-formats", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class ChooseFormats(Pass):
    """Choose the format of every layer together, under a budget.

    ## When to use
    With a budget on size, latency, memory or quality, instead of recipes that treat all layers
    alike. One integer program picks for every group of layers the format that serves the budget
    best, from its bytes, its estimated time on the target and what it costs in quality.

    ## Accuracy
    As the budget's quality demands; without a budget, about one percent of the metric. What a
    format costs is measured by swapping it in (`exact` for all, or `estimate` from errors and
    gradients, corrected by swaps of a sample) on `batches` calibration batches. The driver measures
    the result and corrects the choice.

    ## Limits
    float32 layers. Losses of layers are added up, except for neighbours, whose joint loss is
    measured while work is left for it; the measured result corrects the sum as a whole. Formats
    that are slower than the original, as measured or estimated, are left out unless the compile
    allows slower results.

    ## Example
    A language model keeps its first and last layers in int8 and the rest in int4.
    """

    chooses: ClassVar[bool] = True

    formats: str = option("", help="formats to consider (a,b); empty: what the target is good at")
    sensitivity: str = option(
        "auto", choices=("auto", "exact", "estimate"), help="auto: exact while it is cheap"
    )
    loss: str = option(
        "auto", choices=("auto", "kl", "cosine", "metric"),
        help="what a format costs; auto: kl where a metric judges logits, else cosine",
    )  # fmt: skip
    batches: int = option(
        0, min=0, help="calibration batches that losses are measured on; 0: up to 8, for 512 rows"
    )
    exact_tflop: float = option(0.6, min=0, help="work that auto spends on exact losses, in TFLOP")
    pairs: int = option(32, min=0, help="most pairs of neighbours whose joint loss is measured")
    rounding: str = option(
        "auto", choices=("auto", "nearest", "fitted"),
        help="codes of weights in blocks; auto: fitted to calibration data where there is some",
    )  # fmt: skip
    gap: float = option(0.001, min=0, max=1, help="how far from the best the choice may be")
    seconds: float = option(60.0, min=0.1, help="time limit of the solver")
    widths: bool = option(
        True, help="narrower layers are candidates where 2 percent of quality may be lost"
    )
    products: bool = option(
        True, help="multiplications in front of int8 layers are options where a loss is in the way"
    )
    min_size: int = option(4096, min=0, help="leave layers with fewer weights alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self._given():
            find_format(name)

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        budget = ctx.budget or Budget()
        if self.rounding == "fitted" and ctx.calibration is None:
            return "rounding='fitted' needs calibration data; pass calibration=... (or --calib)"
        if self.loss == "metric" and ctx.evaluate is None:
            return "loss='metric' needs a metric; pass evaluate=... (or --eval)"
        if program.path and any(not c.relative for c in budget.constraints):
            return (
                f"only {program.path!r} and other parts of the model were captured, so limits in "
                "bytes or ms cannot be divided among them; use multiples such as 'size<=0.5x'"
            )
        needs = {c.what for c in budget.constraints} & {"latency", "energy"}
        if ctx.cost_model is None and (needs or budget.minimize == "latency"):
            return "a budget on latency needs a cost model of the target"
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        budget = ctx.budget or Budget()
        sites, left = self._sites(program, ctx, budget)
        baseline = ctx.baseline or Baseline(program.size_bytes())
        learned = Corrections.learn(ctx.observations, baseline, budget)
        if not ctx.allow_slower:
            refuse_measured_slower(sites, learned, ctx.observations)
        widths, crossing = self._widths(program, ctx, budget, sites)
        spent, together = self._fill_losses(program, ctx, sites, widths)
        limits = read_limits(budget, sites, baseline, learned, ctx.observations)

        def solved() -> tuple[Problem, Solution]:
            return self._solve(
                program, ctx, sites, limits, learned, together, widths.sites(), crossing
            )

        problem, solution = solved()
        products: list[str] = []
        # Widths are masks over the program as it is, so they go without.
        if self.products and not widths.found and loses_needlessly(problem, solution, limits):
            scaled = with_products(
                program, ctx, sites, lambda one: read_sites(one, self.selects, self.min_size)[0]
            )
            if scaled is not None:
                fill = replace(self, pairs=0)._fill_losses
                fill(scaled.program, ctx, scaled.sites, Widths.none(scaled.program))
                add_scaled(sites, scaled, ctx.cost_model, allow_slower=ctx.allow_slower)
                problem, solution = solved()
                products = scaled_layers(sites, solution.choice)
                if products:
                    adopt(program, scaled, set(products))
        chosen = {
            path: name
            for one, index in zip(sites, solution.choice, strict=False)
            for path, name in one.options[index].formats.items()
        }
        narrowed = [
            one.options[index].name
            for one, index in zip(widths.sites(), solution.choice[len(sites) :], strict=True)
        ]
        widths.apply(program, narrowed, ctx)
        place(program, chosen, ctx, fitted=self._fits(ctx))
        kept = {p: n for p, n in program.plan.get("formats", {}).items() if p in chosen}
        program.plan["choice"] = {
            **explain([*sites, *widths.sites()], left, problem, solution, limits, learned),
            "widths": widths.explain(narrowed),
            "products": products,
            "budget": budget.texts(),
            "baseline": {"size": baseline.size_bytes, "latency": limits.whole_ms},
            "sensitivity": spent,
            "round": len(ctx.observations) + 1,
        }
        skipped = [Skip(path, reason) for path, reason in left.items()]
        skipped += [
            Skip(layer.path, "the choice under the budget keeps it as it is")
            for one, index in zip(sites, solution.choice, strict=False)
            for layer in one.layers
            if not one.options[index].formats
        ]
        return PassResult(
            changed=bool(kept) or any(name != ORIGINAL for name in narrowed),
            stats={
                "layers": len(kept), "formats": kept, "groups": len(sites),
                "candidates": sum(len(one.options) for one in sites), "status": solution.status,
                "gap": min(solution.gap, 1e9), **spent,
            },
            skipped=skipped,
        )  # fmt: skip

    def _solve(
        self, program: Program, ctx: PassContext, sites: list[Sites], limits: Limits,
        learned: Corrections, together: Sequence[Interaction], narrower: Sequence[Sites],
        crossing: Sequence[Crossing],
    ) -> tuple[Problem, Solution]:  # fmt: skip
        """Solve, and again without what turns out to be slower where it was chosen."""
        near = find_neighbours(program, sites)
        while True:
            pairs = merged([
                *saved_times(sites, near, lambda option_: max(learned.saving(option_), 0.0)),
                *placed(sites, together),
                *crossed(sites, narrower, crossing),
            ])  # fmt: skip
            problem = make_problem([*sites, *narrower], limits, learned, pairs)
            solution = solve(problem, gap=self.gap, seconds=self.seconds)
            solution = settle(problem, solution, limits.within, seconds=self.seconds)
            slower = slower_where_chosen(sites, problem, solution)
            if ctx.allow_slower or not slower:
                return problem, solution
            for place_, now in slower:
                one = sites[place_]
                option_ = one.options.pop(solution.choice[place_])
                one.refuse_slower(
                    option_, f"{option_.latency_source} slower among its neighbours", now
                )

    # ---- candidates

    def _given(self) -> list[str]:
        return [name.strip() for name in self.formats.split(",") if name.strip()]

    def _sites(
        self, program: Program, ctx: PassContext, budget: Budget
    ) -> tuple[list[Sites], dict[str, str]]:
        sites, left = read_sites(program, self.selects, self.min_size)
        kinds = {layer.kind for one in sites for layer in one.layers}
        static = ctx.calibration is not None
        names = {
            kind: format_names(
                kind,
                given=self._given(),
                with_static=static,
                with_stored=asks_for_size(budget),
                with_ranks=allows_loss(budget),
            )
            for kind in kinds
        }
        if ctx.cost_model is not None:
            ctx.cost_model.prepare(
                requests(sites, names),
                lambda done, total: ctx.progress.step(done, total, "timings of operators"),
            )
        fill_options(program, sites, names, ctx.cost_model, allow_slower=ctx.allow_slower)
        return sites, left

    # ---- losses

    def _widths(
        self, program: Program, ctx: PassContext, budget: Budget, sites: Sequence[Sites]
    ) -> tuple[Widths, list[Crossing]]:
        if not (self.widths and allows_loss(budget) and ctx.calibration and ctx.cost_model):
            return Widths.none(program), []
        widths = find_widths(program, ctx, self.selects)
        return widths, price(
            widths, sites, ctx.cost_model, allow_slower=ctx.allow_slower,
            report=lambda done, total: ctx.progress.step(done, total, "timings of widths"),
        )  # fmt: skip

    def _fill_losses(
        self, program: Program, ctx: PassContext, sites: Sequence[Sites], widths: Widths
    ) -> tuple[dict[str, Any], list[Interaction]]:
        """Fill in what every option costs in quality; how that was found, and what pairs add."""
        calls = [(program.args, program.kwargs)]
        if ctx.calibration is not None:
            calls = enough_batches(program, ctx.calibration.for_part(program), self.batches)
        kind = self.loss
        if kind == "auto":
            kind = "kl" if ctx.evaluate is not None and gives_logits(program) else "cosine"
        losses = Losses(program, ctx, calls, kind, place)
        work = [(one, option_) for one in sites for option_ in one.options[1:]]
        exact = self._exact_share(program, len(work), len(calls))
        error: float | None = None
        together: list[Interaction] = []
        if exact >= 1:
            for index, (_, option_) in enumerate(work):
                ctx.progress.step(index, len(work), "formats of layers")
                option_.loss = losses.exact(option_.formats)
            ctx.progress.step(len(work), len(work), "formats of layers")
            most = min(self.pairs, int((exact - 1) * len(work)))
            together = interactions(sites, losses.exact, most)
        else:
            error = self._estimate_losses(program, ctx, sites, losses, exact, kind)
        if self._fits(ctx):
            shares = _scale_to_fitted(sites, losses, ctx)
            together = [
                replace(one, loss=one.loss * shares.get(one.one_option, 1.0)) for one in together
            ]
        fill_losses(widths, losses, ctx)
        return {
            "loss": kind, "batches": len(calls), "exact": losses.measured, "cached": losses.cached,
            "estimated": sum(option_.loss_source == "estimated" for _, option_ in work),
            "estimate_error": error, "pairs": len(together),
        }, together  # fmt: skip

    def _fits(self, ctx: PassContext) -> bool:
        return self.rounding != "nearest" and ctx.calibration is not None

    def _exact_share(self, program: Program, swaps: int, batches: int) -> float:
        """The share of swaps to measure exactly; decided by work, which no clock disturbs."""
        if not swaps:
            return 1.0
        # After a swap only what follows it runs again: half of the model on average.
        work = swaps * batches * max(program.flops(), 1) / 2
        share = self.exact_tflop * 1e12 / work
        if self.sensitivity == "exact":
            return max(share, 1.0)
        return min(share, 0.5) if self.sensitivity == "estimate" else share

    def _estimate_losses(
        self, program: Program, ctx: PassContext, sites: Sequence[Sites], losses: Losses,
        share: float, kind: str,
    ) -> float | None:  # fmt: skip
        cheap = estimate(
            program, losses.batches[0], [x for one in sites for x in one.layers], kind, ctx.seed
        )
        sample = _spread(len(sites), max(round(share * len(sites)), min(len(sites), 3)))
        logs: dict[str, list[float]] = {}
        for one in sites:
            ctx.check_time(f"estimating what formats of {one.name} cost")
            layers = {layer.path: layer for layer in one.layers}
            for option_ in one.options[1:]:
                option_.loss = sum(cheap(layers[p], name) for p, name in option_.formats.items())
                option_.loss_source = "estimated"
        # The gradients of all layers would stay while candidates are placed.
        del cheap
        trim_heap()
        for index in sorted(sample):
            one = sites[index]
            ctx.progress.step(index, len(sites), "groups of layers")
            ctx.check_time(f"measuring what formats of {one.name} cost")
            for option_ in one.options[1:]:
                exact = losses.exact(option_.formats)
                if exact > 0 and option_.loss > 0:
                    ratio = math.log(exact / option_.loss)
                    logs.setdefault(option_.name, []).append(ratio)
                option_.loss, option_.loss_source = exact, "exact"
        every = [value for found in logs.values() for value in found]
        middle = median(every) if every else 0.0
        for one in sites:
            for option_ in one.options[1:]:
                if option_.loss_source == "estimated":
                    option_.loss *= math.exp(median(logs.get(option_.name) or [middle]))
        return _held_out_error(logs)


def _scale_to_fitted(sites: Sequence[Sites], losses: Losses, ctx: PassContext) -> dict[str, float]:
    """Losses of rounding to nearest, times what fitting leaves of them in a sample of groups.

    Returns that share for every format that it is about.
    """
    shares: dict[str, float] = {}
    names = dict.fromkeys(o.name for one in sites for o in one.options[1:])
    for name in filter(is_fitted, names):
        found = [o for one in sites for o in one.options if o.name == name and o.loss > 0]
        ratios: list[float] = []
        for index in sorted(_spread(len(found), _FITTED_SAMPLE)):
            ctx.progress.step(len(ratios), _FITTED_SAMPLE, f"groups fitted in {name}")
            fitted = losses.exact(found[index].formats, fitted=True)
            ratios.append(fitted / losses.exact(found[index].formats))
        shares[name] = median(ratios) if ratios else 1.0
        for option_ in found:
            option_.loss *= shares[name]
            option_.loss_source = "estimated"
    return shares


def _spread(total: int, wanted: int) -> set[int]:
    """``wanted`` of ``total`` indices, evenly spread, ends included."""
    if wanted >= total:
        return set(range(total))
    return {round(i * (total - 1) / max(wanted - 1, 1)) for i in range(wanted)}


def _held_out_error(logs: Mapping[str, Sequence[float]]) -> float | None:
    """Median factor, minus one, by which an estimate is off when corrected by the others only."""
    off = []
    for found in logs.values():
        for index, value in enumerate(found):
            others = [*found[:index], *found[index + 1 :]]
            if others:
                off.append(abs(value - median(others)))
    return math.expm1(median(off)) if off else None
