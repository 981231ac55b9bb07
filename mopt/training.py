"""Training within a memory budget: settings, the plan of each joint graph, and what was decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mopt.call_cost import Measured, estimate
from mopt.chunked_loss import use_chunked_loss
from mopt.errors import BudgetNotMet, InputError, UsageError, quote, unknown_name
from mopt.joint_graph import Joint, is_backward, read_joint
from mopt.joint_split import split
from mopt.recompute import Item, RecomputePlan, RecomputeProblem, parse_bytes, replay
from mopt.registry import find_step_planner
from mopt.saved_codecs import LOSSY, exact_forms, lossy_forms, offer

CODEGENS = ("eager", "inductor")
COSTS = ("measured", "estimated")
SOLVERS = ("auto", "greedy", "exact")
ALLOWED = ("exact", "lossy")


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
    share of the activations. ``chunk_loss``: a linear layer that only feeds a cross-entropy never
    makes its logits as a whole (gradients equal up to the order of sums). ``allow``: ``exact``, or
    ``lossy`` to keep results of matrix products, convolutions and attention in ``lossy_form``
    (``int8``, ``int4``, ``fp8``) where that repeats less time; gradients are approximate then.
    """

    memory_budget: int | float | str | None = None
    codegen: str = "eager"
    costs: str = "measured"
    solver: str = "auto"
    seconds: float = 10.0
    other_bytes: int = 0
    graphs: int = 1
    chunk_loss: bool = False
    allow: str = "exact"
    lossy_form: str = "int8"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TrainingOptions:
        """Checked options. Raises UsageError or InputError that name what is wrong."""
        known = cls.__dataclass_fields__
        for name in options:
            if name not in known:
                raise unknown_name("training option", name, known, "see docs/training.md")
        found = cls(**options)
        for name, allowed in (
            ("codegen", CODEGENS), ("costs", COSTS), ("solver", SOLVERS), ("allow", ALLOWED),
            ("lossy_form", LOSSY),
        ):  # fmt: skip
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
    """One module of the model: bytes kept whole, kept in a smaller form, given up; repeats."""

    layer: str
    kept_bytes: int
    squeezed_bytes: int
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
            kept = sum(problem.sizes[s] for s in call.makes if s in plan.saved and not call.form)
            small = sum(problem.sizes[s] for s in call.makes if s in plan.saved and call.form)
            gone = sum(problem.sizes[s] for s in call.makes if s in wanted - plan.saved)
            times = repeats.get(index, 0)
            again = call.again.seconds * times if call.again else 0.0
            if kept or small or gone or times:
                row = rows.setdefault(call.layer or "(model)", [0, 0, 0, 0, 0.0])
                for place, value in enumerate((kept, small, gone, times, again)):
                    row[place] += value
        return [
            LayerPlan(n, int(r[0]), int(r[1]), int(r[2]), int(r[3]), r[4]) for n, r in rows.items()
        ]

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

    def prepare(self, module: fx.GraphModule) -> None:
        """What is to be done to a graph of dynamo's before forward and backward are traced."""
        if self.options.chunk_loss:
            use_chunked_loss(module)

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
        number = len(self.plans) + 1
        values = _values(module)
        offer(module, exact_forms(values))
        joint = read_joint(module, num_outputs, price, fixed=held)
        budget = self._budget(joint.problem)
        found: tuple[Joint, RecomputePlan] | None = None
        try:
            found = joint, self._solve(joint.problem, budget)
        except BudgetNotMet as error:
            if self.options.allow != "lossy":
                if number > max(1, self.options.graphs):
                    error.hint = (
                        f"the model breaks into {number} graphs or more and earlier ones used the "
                        f'budget: pass options={{"graphs": {number}}} to share it evenly'
                    )
                raise
        if self.options.allow == "lossy" and (found is None or found[1].repeats()):
            offer(module, lossy_forms(values, self.options.lossy_form))
            smaller = read_joint(module, num_outputs, price, fixed=held)
            plan = self._solve(smaller.problem, budget)
            if found is None or plan.figures.repeated_seconds < found[1].figures.repeated_seconds:
                found = smaller, plan
        assert found is not None
        joint, plan = found
        self.plans.append(GraphPlan(plan, joint.problem, joint.kinds, self.options.costs, number))
        return joint, plan

    def _solve(self, problem: RecomputeProblem, budget: int) -> RecomputePlan:
        options = self.options
        return find_step_planner()(
            problem, budget, seconds=options.seconds, solver=options.solver
        )  # fmt: skip

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


def _values(module: fx.GraphModule) -> list[fx.Node]:
    """Forward's calls and their parts, in order."""
    return [n for n in module.graph.nodes if n.op == "call_function" and not is_backward(n)]


def plain_peak(problem: RecomputeProblem) -> int:
    """The peak of the step that keeps everything."""
    items = [Item(i) for i in range(len(problem.backward))]
    return replay(problem, problem.keep_all, items).peak
