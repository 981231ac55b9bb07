"""Training within a memory budget: settings, the plan of each joint graph, and what was decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mopt.call_cost import Measured, estimate
from mopt.errors import BudgetNotMet, InputError, UsageError, quote, unknown_name
from mopt.joint_graph import Joint, read_joint
from mopt.joint_split import split
from mopt.recompute import Item, RecomputePlan, RecomputeProblem, parse_bytes, replay
from mopt.registry import find_step_planner

CODEGENS = ("eager", "inductor")
COSTS = ("measured", "estimated")
SOLVERS = ("auto", "greedy", "exact")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What ``options=`` of ``torch.compile(model, backend="mopt")`` may hold.

    ``memory_budget``: the peak of forward and backward with weights, inputs and gradients, as bytes
    (``"2GiB"``) or as a share of the plain step's activations (``"35%"``); None keeps everything.
    ``codegen``: ``eager`` runs PyTorch's own kernels, ``inductor`` compiles them. ``costs``:
    ``measured`` runs each kind of call once on this machine, ``estimated`` uses shapes.
    ``solver``: ``auto``, ``greedy`` or ``exact`` (an integer program, for small graphs);
    ``seconds``: time for planning one graph. ``other_bytes``: what else lies in the same memory,
    such as optimizer state. ``graphs``: into how many graphs the model breaks; each gets an even
    share of the activations.
    """

    memory_budget: int | float | str | None = None
    codegen: str = "eager"
    costs: str = "measured"
    solver: str = "auto"
    seconds: float = 10.0
    other_bytes: int = 0
    graphs: int = 1

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TrainingOptions:
        """Checked options. Raises UsageError or InputError that name what is wrong."""
        known = cls.__dataclass_fields__
        for name in options:
            if name not in known:
                raise unknown_name("training option", name, known, "see docs/training.md")
        found = cls(**options)
        for name, allowed in (("codegen", CODEGENS), ("costs", COSTS), ("solver", SOLVERS)):
            if getattr(found, name) not in allowed:
                raise UsageError(
                    f"{name} is {quote(getattr(found, name))}",
                    code="training-option",
                    hint=f"known: {', '.join(allowed)}",
                )
        if found.memory_budget is not None:
            parse_bytes(found.memory_budget)
        if found.graphs < 1 or found.seconds <= 0 or found.other_bytes < 0:
            raise InputError(
                "graphs, seconds and other_bytes are numbers above 0 (other_bytes from 0)",
                code="training-option",
            )
        return found


@dataclass(frozen=True)
class LayerPlan:
    """One module of the model: bytes kept and given up, seconds repeated."""

    layer: str
    kept_bytes: int
    dropped_bytes: int
    repeated_calls: int
    repeated_seconds: float


@dataclass(frozen=True)
class GraphPlan:
    """What was decided for one graph. ``kinds`` are the bytes that no plan changes."""

    plan: RecomputePlan
    problem: RecomputeProblem = field(repr=False)
    kinds: Mapping[str, int]
    costs: str
    number: int = 1

    @property
    def layers(self) -> list[LayerPlan]:
        """The plan by module, in the order of forward; modules with nothing are left out."""
        problem, plan = self.problem, self.plan
        repeats = plan.repeats()
        rows: dict[str, list[float]] = {}
        wanted = problem.keep_all | plan.saved
        for index, call in enumerate(problem.forward):
            kept = sum(problem.sizes[s] for s in call.makes if s in plan.saved)
            gone = sum(problem.sizes[s] for s in call.makes if s in wanted - plan.saved)
            times = repeats.get(index, 0)
            again = call.again.seconds * times if call.again else 0.0
            if kept or gone or times:
                row = rows.setdefault(call.layer or "(model)", [0, 0, 0, 0.0])
                for place, value in enumerate((kept, gone, times, again)):
                    row[place] += value
        return [LayerPlan(n, int(r[0]), int(r[1]), int(r[2]), r[3]) for n, r in rows.items()]

    def to_data(self) -> dict[str, Any]:
        """The plan as JSON holds it, layers included."""
        return {
            **self.plan.to_data(),
            "graph": self.number,
            "costs": self.costs,
            "step_seconds": self.problem.seconds,
            "constant": dict(self.kinds),
            "layers": [vars(row) for row in self.layers],
        }


class TrainingSession:
    """Plans the graphs of one model, one after another; ``plans`` holds what was decided."""

    def __init__(self, options: TrainingOptions) -> None:
        self.options = options
        self.plans: list[GraphPlan] = []
        self._measured = Measured()

    def partition(
        self, joint_module: fx.GraphModule, _inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """A partition function for AOTAutograd: the forward and the backward graph of the plan."""
        joint, plan = self.plan(joint_module, num_fwd_outputs)
        return split(joint, plan.saved, plan.items)

    def plan(self, module: fx.GraphModule, num_outputs: int) -> tuple[Joint, RecomputePlan]:
        """Read a joint graph, plan it within the budget and list the plan."""
        price: Callable[[fx.Node], tuple[float, int]] = estimate
        if self.options.costs == "measured":
            price = self._measured
        held = self.options.other_bytes + sum(g.plan.figures.saved_bytes for g in self.plans)
        joint = read_joint(module, num_outputs, price, fixed=held)
        number = len(self.plans) + 1
        solve = find_step_planner()
        budget = self._budget(joint.problem)
        try:
            plan = solve(
                joint.problem, budget, seconds=self.options.seconds, solver=self.options.solver
            )
        except BudgetNotMet as error:
            if number > max(1, self.options.graphs):
                error.hint = (
                    f"the model breaks into {number} graphs or more and earlier ones used the "
                    f'budget: pass options={{"graphs": {number}}} to share it evenly'
                )
            raise
        self.plans.append(GraphPlan(plan, joint.problem, joint.kinds, self.options.costs, number))
        return joint, plan

    def _budget(self, problem: RecomputeProblem) -> int:
        given = self.options.memory_budget
        if given is None:
            return 1 << 62
        amount = parse_bytes(given)
        left = max(1, self.options.graphs - len(self.plans))
        if isinstance(amount, int):
            room = amount - problem.constant
            return problem.constant + room // left if room > 0 else amount
        plain = plain_peak(problem)
        return problem.constant + int(amount * (plain - problem.constant))


def plain_peak(problem: RecomputeProblem) -> int:
    """The peak of the step that keeps everything."""
    items = [Item(i) for i in range(len(problem.backward))]
    return replay(problem, problem.keep_all, items).peak
