"""From a program to the problem of two memories: steps, values, and what a runtime fuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from mopt.effects import argument, is_pure, may_write, written_by
from mopt.flops import node_flops
from mopt.passes.schedule._liveness import Liveness
from mopt.storages import Origin
from mopt.tiers import TierProblem, TierStep, TierValue

# Products of two operands, by their positions: one has to be at hand while the other streams by.
_FACTORS = {
    "linear": ((0, 1),), "conv1d": ((0, 1),), "conv2d": ((0, 1),), "conv3d": ((0, 1),),
    "convolution": ((0, 1),), "conv_transpose2d": ((0, 1),), "matmul": ((0, 1),), "mm": ((0, 1),),
    "bmm": ((0, 1),), "addmm": ((1, 2),), "baddbmm": ((1, 2),),
    "scaled_dot_product_attention": ((0, 1), (0, 2)),
}  # fmt: skip
# Computed element by element where they do not train, though they carry no such tag.
_POINTWISE = ("batch_norm", "_native_batch_norm_legit_no_training", "dropout", "relu6", "silu")
_LOOKUPS = ("embedding",)
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True)
class Speeds:
    """What a device computes and reads in its fast memory a second, and what a call costs."""

    flops: float = 5e10
    bandwidth: float = 1e10
    call: float = 3e-6


@dataclass(frozen=True)
class TierModel:
    """A problem, the bytes that hold everything at once, and the calls of every step."""

    problem: TierProblem
    needs_bytes: int
    calls: tuple[tuple[int, ...], ...]


@dataclass
class _Group:
    """Calls that run as one step: the first, and what a runtime fuses into its result."""

    calls: list[int] = field(default_factory=list)


def tier_problem(
    live: Liveness,
    fast_bytes: Callable[[int], int],
    *,
    alignment: int = 64,
    window: Callable[[int], int],
    most_pieces: int = 8,
    weights: bool = True,
    writable: bool = True,
    fuse: bool = True,
    speeds: Speeds | None = None,
) -> TierModel:
    """Steps and values of a program in its present order, and the calls of each step.

    ``fast_bytes`` gives the capacity from the bytes it takes to hold everything, ``window`` the
    room of a streamed value from the capacity. Without ``weights`` they lie in a memory of their
    own. With ``fuse`` elementwise calls belong to the step whose result nobody else reads.
    """
    groups = _fused(live) if fuse else [_Group([v]) for v in range(live.problem.count)]
    model = _Model(live, groups, alignment, weights, speeds or Speeds())
    steps, values = tuple(model.steps()), tuple(model.values())
    if not writable:
        steps, values = _with_readers(steps, values)
    needs = _most_alive(steps, values)
    capacity = fast_bytes(needs) // alignment * alignment
    problem = TierProblem(
        steps, values, capacity,
        window_bytes=max(window(capacity) // alignment, 1) * alignment,
        alignment=alignment, most_pieces=most_pieces, writable=writable,
    )  # fmt: skip
    return TierModel(problem, needs, tuple(tuple(group.calls) for group in groups))


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2].rstrip("_")
    return ""


def _is_pointwise(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not is_pure(node) or may_write(node):
        return False
    if torch.Tag.pointwise in node.target.tags:
        return True
    return _name(node) in _POINTWISE and argument(node, "training") is not True


def _fused(live: Liveness) -> list[_Group]:
    """Calls by step: an elementwise call joins the last maker of what it alone reads.

    It may where all else that it needs runs before that step begins.
    """
    problem, trace = live.problem, live.trace
    groups = [_Group([v]) for v in range(problem.count)]
    of = list(range(problem.count))
    maker = {s: v for v, made in enumerate(problem.makes) for s in made}
    for v, node in enumerate(live.calls):
        if not _is_pointwise(node) or len(problem.makes[v]) != 1:
            continue
        shape = [view.shape for view in trace.views[node.name]]
        found = [
            of[maker[s]] for source in node.all_input_nodes for s in trace.of(source)
            if s in maker and s not in problem.kept and len(problem.makes[maker[s]]) == 1
            and set(problem.touchers[s]) == {maker[s], v}
            and [view.shape for view in trace.views.get(source.name, ())] == shape
        ]  # fmt: skip
        home = max(found, default=None)
        if home is None or any(of[u] > home for u in problem.before[v]):
            continue
        of[v] = home
        groups[home].calls.append(v)
        groups[v].calls.clear()
    return [group for group in groups if group.calls]


class _Model:
    """Steps and values under names: a step is called like its first call."""

    def __init__(
        self, live: Liveness, groups: list[_Group], alignment: int, weights: bool, speeds: Speeds
    ) -> None:
        self.live, self.groups, self.alignment, self.speeds = live, groups, alignment, speeds
        trace, problem = live.trace, live.problem
        inner = {s for group in groups for v in group.calls[:-1] for s in problem.makes[v]}
        self.counted = {
            s for s, info in enumerate(trace.storages)
            if info.bytes and s not in inner and (weights or info.origin is not Origin.WEIGHT)
        }  # fmt: skip
        seen: dict[str, int] = {}
        self.names: dict[int, str] = {}
        for s, info in enumerate(trace.storages):
            number = seen.get(info.maker, 0)
            seen[info.maker] = number + 1
            self.names[s] = f"{info.maker}.{number}" if number else info.maker
        self.used: set[int] = set()

    def steps(self) -> Iterator[TierStep]:
        problem = self.live.problem
        home = {v: group.calls[0] for group in self.groups for v in group.calls}
        for group in self.groups:
            calls = [self.live.calls[v] for v in group.calls]
            touched = {s for node in calls for s in self.live.trace.touched(node)} & self.counted
            makes = [s for v in group.calls for s in problem.makes[v] if s in self.counted]
            writes = {s for node in calls for s in self._written(node)} & self.counted - set(makes)
            self.used |= touched
            last = group.calls[-1]
            takes = problem.may_take(last) if len(group.calls) == 1 else ()
            before = {home[u] for v in group.calls for u in problem.before[v]} - {group.calls[0]}
            yield TierStep(
                calls[0].name,
                reads=self._named(touched - set(makes) - writes),
                makes=self._named(makes), writes=self._named(writes),
                before=tuple(self.live.calls[u].name for u in sorted(before)),
                takes=self._named(s for s in takes if s in self.counted),
                one_of=tuple(self._one_of(calls[0])),
                workspace=max(problem.needs(v) for v in group.calls),
                seconds=sum(self._seconds(node) for node in calls),
            )  # fmt: skip

    def values(self) -> Iterator[TierValue]:
        for s in sorted(self.used):
            info = self.live.trace.storages[s]
            size = -(-self._bytes(s) // self.alignment) * self.alignment
            made = info.origin is Origin.MADE
            yield TierValue(
                self.names[s], size, given=not made,
                kept=s in self.live.problem.kept and info.origin is not Origin.WEIGHT,
            )  # fmt: skip

    def _named(self, storages: object) -> tuple[str, ...]:
        return tuple(self.names[s] for s in sorted(storages))  # type: ignore[call-overload]

    def _bytes(self, s: int) -> int:
        """The bytes of a storage; of a table in which rows are looked up only those of the rows."""
        info = self.live.trace.storages[s]
        readers = [n for n in self.live.calls if s in self.live.trace.touched(n)]
        if info.origin is Origin.WEIGHT and all(_name(n) in _LOOKUPS for n in readers):
            rows = sum(v.bytes for n in readers for v in self.live.trace.views[n.name])
            return min(info.bytes, rows)
        return info.bytes

    def _written(self, node: fx.Node) -> Iterator[int]:
        """The storages that a call writes to in place."""
        for target in written_by(node) if may_write(node) else ():
            yield from self.live.trace.of(target)

    def _one_of(self, node: fx.Node) -> Iterator[tuple[str, ...]]:
        name = _name(node)
        for pair in _FACTORS.get(name, ()):
            factors = [node.args[n] for n in pair if n < len(node.args)]
            storages = [self.live.trace.of(f) for f in factors if isinstance(f, fx.Node)]
            if len(storages) == len(pair) and all(len(s & self.counted) == 1 for s in storages):
                yield tuple(sorted({self.names[s] for found in storages for s in found}))
        if name in _RECURRENT:
            # The weights are read again at every position of the sequence.
            for s in sorted(self.live.trace.touched(node) & self.counted):
                if self.live.trace.storages[s].origin is Origin.WEIGHT:
                    yield (self.names[s],)

    def _seconds(self, node: fx.Node) -> float:
        moved = sum(self.live.trace.storages[s].bytes for s in self.live.trace.touched(node)
                    if s in self.counted)  # fmt: skip
        work = max(node_flops(node) / self.speeds.flops, moved / self.speeds.bandwidth)
        return work + self.speeds.call


def _with_readers(
    steps: tuple[TierStep, ...], values: tuple[TierValue, ...]
) -> tuple[tuple[TierStep, ...], tuple[TierValue, ...]]:
    """Results that are read in the end: no slow memory can take them."""
    results = tuple(v.id for v in values if v.kept and not v.given)
    end = TierStep("output", reads=results, before=tuple(step.id for step in steps))
    return (*steps, end), tuple(replace(v, kept=False) for v in values)


def _most_alive(steps: tuple[TierStep, ...], values: tuple[TierValue, ...]) -> int:
    """Bytes it takes to hold everything at once: given values throughout, the rest by lifetime."""
    size = {v.id: v.bytes for v in values}
    last = {name: at for at, step in enumerate(steps) for name in step.touches}
    last |= {v.id: len(steps) for v in values if v.kept}
    live = most = sum(v.bytes for v in values if v.given)
    given = {v.id for v in values if v.given}
    for at, step in enumerate(steps):
        taken = sum(size[n] for n in step.takes[:1] if last[n] == at)
        live += sum(size[n] for n in step.makes)
        most = max(most, live + step.workspace - taken)
        live -= sum(size[n] for n in step.touches if last[n] == at and n not in given)
    return most
