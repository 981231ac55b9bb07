"""Training within a memory budget: settings, the plan of each joint graph, and what was decided."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from mopt.call_cost import Measured, estimate, priced_by
from mopt.chunked_loss import use_chunked_loss
from mopt.early_update import Updater, postpone, write_updates
from mopt.errors import BudgetNotMet, InputError, UsageError, quote, unknown_name
from mopt.joint_graph import Joint, read_joint, tensors
from mopt.joint_split import split
from mopt.joint_tags import is_backward
from mopt.offload import measure_link, offer_offload
from mopt.quantity import read_bytes
from mopt.recompute import (
    OFFLOAD,
    Item,
    Link,
    RecomputePlan,
    RecomputeProblem,
    parse_bytes,
    replay,
)
from mopt.registry import find_step_planner
from mopt.reversible import INVERSE, offer_inverses
from mopt.saved_codecs import LOSSY, exact_forms, lossy_forms, offer, withdraw

CODEGENS = ("eager", "inductor")
COSTS = ("measured", "estimated", "device")
SOLVERS = ("auto", "greedy", "exact")
ALLOWED = ("exact", "rounding", "lossy")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What ``options=`` of ``torch.compile(model, backend="mopt")`` may hold.

    ``memory_budget``: the peak of forward and backward with weights, inputs and gradients, as bytes
    (``"2GiB"``) or as a share of the plain step's activations (``"35%"``); None keeps everything.
    ``codegen``: ``eager`` runs PyTorch's own kernels, ``inductor`` compiles them. ``costs``:
    ``measured`` runs each kind of call once on this machine, ``estimated`` uses shapes,
    ``device`` the cost model of ``device``.
    ``solver``: ``auto``, ``greedy`` or ``exact`` (an integer program, for small graphs);
    ``seconds``: time for planning one graph. ``other_bytes``: what else lies in the same memory,
    such as optimizer state. ``graphs``: into how many graphs the model breaks; each gets an even
    share of the activations. ``chunk_loss``: a linear layer that only feeds a cross-entropy never
    makes its logits as a whole (gradients equal up to the order of sums). ``allow``: ``exact``;
    ``rounding`` to have values of reversible blocks again from sums, which rounds; or ``lossy`` to
    keep results of matrix products, convolutions and attention in ``lossy_form`` (``int8``,
    ``int4``, ``fp8``, ``int8-running``, ``fp8-mixed``; ``rows``: a sample of what weights'
    gradients sum; ``derivative``: four bits for GELU's and SiLU's inputs) where that repeats less
    time; gradients are approximate then.
    ``offload``: values may be moved out until backward, on a CPU to a file in this folder
    (``"auto"``: the folder of temporary files), on a GPU to host memory; ``link_bandwidth``: bytes
    a second each way, where they are not to be measured. ``update_at_once``: each parameter is
    updated right after its gradient, which then is gone (``mopt.fit`` with an optimizer only).
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
    offload: str = ""
    link_bandwidth: float | str | None = None
    update_at_once: bool = False
    device: str = ""

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
        if found.offload and found.codegen != "eager":
            raise UsageError('offload needs codegen "eager"', code="training-option")
        if found.link_bandwidth is not None:
            bytes_per_second(found.link_bandwidth)
        return found


@dataclass(frozen=True)
class LayerPlan:
    """One module of the model: what backward gets from it, in bytes of the values; repeats.

    ``squeezed_bytes`` are those of the smaller forms; ``dropped_bytes`` are made again or had from
    a smaller form.
    """

    layer: str
    kept_bytes: int
    squeezed_bytes: int
    offloaded_bytes: int
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
        away = {
            s for call in problem.forward if call.form == OFFLOAD and call.again
            for s in call.again.makes if not plan.saved.isdisjoint(call.makes)
        }  # fmt: skip
        for index, call in enumerate(problem.forward):
            own = [s for s in call.makes if s in plan.saved]
            kept = 0 if call.form else sum(problem.sizes[s] for s in own if s not in away)
            small = sum(problem.sizes[s] for s in own) if call.form else 0
            out = 0
            if call.form == OFFLOAD and call.again and small:
                small, out = 0, sum(problem.sizes[s] for s in call.again.makes)
            gone = sum(problem.sizes[s] for s in call.makes if s in wanted - plan.saved - away)
            times = repeats.get(index, 0)
            again = call.again.seconds * times if call.again else 0.0
            if kept or small or out or gone or times:
                row = rows.setdefault(call.layer or "(model)", [0, 0, 0, 0, 0, 0.0])
                times = 0 if call.form not in ("", INVERSE) else times
                for place, value in enumerate((kept, small, out, gone, times, again)):
                    row[place] += value
        return [
            LayerPlan(n, int(r[0]), int(r[1]), int(r[2]), int(r[3]), int(r[4]), r[5])
            for n, r in rows.items()
        ]

    def to_data(self) -> dict[str, Any]:
        """The plan as JSON holds it, layers included."""
        return {
            **self.plan.to_data(),
            "graph": self.number,
            "costs": self.costs,
            "step_seconds": self.problem.seconds,
            "constant": dict(self.kinds),
            "link": vars(self.problem.link) if self.problem.link else None,
            "offloaded_bytes": sum(row.offloaded_bytes for row in self.layers),
            "layers": [vars(row) for row in self.layers],
        }

    def report_section(self) -> dict[str, Any]:
        """``to_data`` with what is needed to draw it: the bytes alive at each call.

        ``timeline`` has the forward calls, then backward in the plan's order: name, layer, what
        kind of call it is (``forward``, ``backward``, ``repeat``, or a form's name), bytes alive,
        and ``plain_timeline`` the bytes of the plain step's calls.
        """
        problem, plan = self.problem, self.plan
        rows = [(c, "forward") for c in problem.forward]
        for item in plan.items:
            call = (problem.forward if item.repeat else problem.backward)[item.index]
            rows.append((call, (call.form or "repeat") if item.repeat else "backward"))
        timeline = [
            {"call": call.name, "layer": call.layer, "kind": kind, "bytes": size}
            for (call, kind), size in zip(rows, plan.figures.live, strict=True)
        ]
        return {
            **self.to_data(), "timeline": timeline, "plain_timeline": list(plan.plain.live),
        }  # fmt: skip


def bytes_per_second(given: float | str) -> float:
    """A rate such as ``2GB/s``. Raises InputError."""
    amount = (
        float(given) if isinstance(given, int | float) else read_bytes(given.removesuffix("/s"))
    )
    if not amount or amount <= 0:
        raise InputError(
            f"link_bandwidth is {given!r}", code="training-option", hint="such as 2GB/s"
        )
    return float(amount)


class TrainingSession:
    """Plans the graphs of one model, one after another; ``plans`` holds what was decided."""

    def __init__(self, options: TrainingOptions, measured: Measured | None = None) -> None:
        self.options = options
        self.plans: list[GraphPlan] = []
        self.updater = Updater(None)
        self._inputs: Sequence[Any] = ()
        self._measured = Measured() if measured is None else measured

    def prepare(self, module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """What is to be done to a graph of dynamo's before forward and backward are traced."""
        self._inputs = inputs
        if self.options.chunk_loss:
            use_chunked_loss(module)

    def partition(
        self, joint_module: fx.GraphModule, _inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """A partition function for AOTAutograd: the forward and the backward graph of the plan."""
        joint, plan = self.plan(joint_module, num_fwd_outputs)
        return split(joint, plan.saved, plan.items, plan.settled)

    def plan(self, module: fx.GraphModule, num_outputs: int) -> tuple[Joint, RecomputePlan]:
        """Read a joint graph, plan it within the budget and list the plan."""
        price: Callable[[fx.Node], tuple[float, int]] = estimate
        if self.options.costs == "measured":
            price = self._measured
        elif self.options.costs == "device":
            price = priced_by(self.options.device or "host")
        held = self.options.other_bytes + sum(g.plan.figures.saved_bytes for g in self.plans)
        number = len(self.plans) + 1
        if self.options.update_at_once:
            write_updates(module, num_outputs, self._inputs, self.updater)
        values = _values(module)
        offer(module, exact_forms(values))
        link = self._link(module, values)

        def read() -> Joint:
            return read_joint(module, num_outputs, price, fixed=held, link=link)

        budget = self._budget((joint := read()).problem)
        found: tuple[Joint, RecomputePlan] | None = None
        try:
            found = self._solve(joint, budget, read)
        except BudgetNotMet as error:
            if self.options.allow == "exact":
                if number > max(1, self.options.graphs):
                    error.hint = (
                        f"the model breaks into {number} graphs or more and earlier ones used the "
                        f'budget: pass options={{"graphs": {number}}} to share it evenly'
                    )
                raise
        if self.options.allow != "exact" and (found is None or found[1].seconds):
            offer_inverses(module, values)
            if self.options.allow == "lossy":
                offer(module, lossy_forms(values, self.options.lossy_form))
            smaller = self._solve(read(), budget, read)
            if found is None or smaller[1].seconds < found[1].seconds:
                found = smaller
        assert found is not None
        joint, plan = found
        if max(number, self.options.graphs) > 1:
            plan = replace(plan, notes=(*plan.notes, self._share_note(number)))
        self.plans.append(GraphPlan(plan, joint.problem, joint.kinds, self.options.costs, number))
        return joint, plan

    def _link(self, module: fx.GraphModule, values: list[fx.Node]) -> Link | None:
        """The link that values may be moved out over; the moves are written into the graph."""
        folder, given = self.options.offload, self.options.link_bandwidth
        if not folder:
            return None
        folder = tempfile.gettempdir() if folder == "auto" else folder
        if not offer_offload(module, values, folder):
            return None
        if given is not None:
            return Link(bytes_per_second(given), bytes_per_second(given))
        device = next(t.device for n in values for t in tensors(n))
        with _disable_current_modes():
            return measure_link(folder, device)

    def _solve(
        self, joint: Joint, budget: int, read: Callable[[], Joint]
    ) -> tuple[Joint, RecomputePlan]:
        """The plan of a joint graph, and the graph read again where updates had to move."""
        solve = partial(
            find_step_planner(), seconds=self.options.seconds, solver=self.options.solver
        )
        plan = solve(joint.problem, budget)
        while postpone(joint, plan.items) or withdraw(joint, plan.items):
            joint = read()
            plan = solve(joint.problem, budget)
        return joint, plan

    def _share_note(self, number: int) -> str:
        """Which part of the budget a graph of several got."""
        count = max(number, self.options.graphs)
        given = self.options.memory_budget
        share = f"1/{max(1, self.options.graphs - number + 1)} of what the budget leaves"
        if isinstance(given, str) and given.strip().endswith("%"):
            share = f"{given.strip()} of its own activations"
        return f"graph {number} of {count}: {share}"

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
    """Forward's calls and their parts, in order, without views of earlier values and of inputs."""
    seen: set[int] = set()
    found = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            key = value.untyped_storage()._cdata
            if key in seen:
                continue
            seen.add(key)
        if node.op == "call_function" and not is_backward(node):
            found.append(node)
    return found


def plain_peak(problem: RecomputeProblem) -> int:
    """The peak of the step that keeps everything."""
    items = [Item(i) for i in range(len(problem.backward))]
    return replay(problem, problem.keep_all, items).peak
