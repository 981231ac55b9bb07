"""Runs a program once, call by call, to learn how each call can be placed and what it allocates.

Every way to run a call in given memory is tried on the values of the example inputs and kept only
if its result has the same bits as the plain call's. What calls allocate by themselves is watched
in the same run, so the facts are measurements: of this machine, with its present thread count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mopt.allocations import Allocations, record_allocations
from mopt.backends.eager.out_calls import Way, ways
from mopt.effects import is_pure
from mopt.program import Program, is_dynamic
from mopt.storages import CallFacts, StorageTrace


def record_calls(program: Program) -> tuple[StorageTrace, dict[str, CallFacts]]:
    """The storages of a real run on the example inputs, and the facts of every call."""
    recorder = _Recorder(program)
    with record_allocations() as allocations:
        recorder.start(program, allocations)
    return recorder.trace, recorder.facts(allocations)


class _Recorder(fx.Interpreter):
    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.trace = StorageTrace()
        self._ways: dict[str, list[str]] = {}
        self._takes: dict[tuple[str, str], list[str]] = {}
        self._log = Allocations()
        # Other sizes run without the plan and need the weights as they are; both are too much.
        inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
        self._may_pack = not any(is_dynamic(node) for node in inputs)

    def start(self, program: Program, log: Allocations) -> None:
        self._log = log
        flat = program.flat_inputs(program.args, program.kwargs)
        with torch.no_grad():
            self.run(*flat, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return super().run_node(n)
        with self._log.section(f"plain {n.name}"):
            value = super().run_node(n)
        self.trace.record(n, value)
        if is_pure(n) and isinstance(value, Tensor) and _is_plain(value) and self.trace.made_by(n):
            self._try_ways(n, value)
        return value

    def _try_ways(self, node: fx.Node, value: Tensor) -> None:
        given, kwargs = self.fetch_args_kwargs_from_env(node)
        good = []
        for name, way, run in ways(node.target):
            args = given
            if way.pack is not None:
                if not self._may_pack:
                    continue
                packed = _packed(way, node, args, kwargs)
                if packed is None:
                    continue
                args = packed
            place = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            with self._log.section(f"{name} {node.name}"):
                done = _runs(run, place, args, kwargs)
            if done and same_bits(place, value):
                good.append(name)
                self._takes[name, node.name] = self._takeable(node, run, value, args, kwargs)
        self._ways[node.name] = good

    def _takeable(
        self, node: fx.Node, run: Any, value: Tensor, args: Any, kwargs: Any
    ) -> list[str]:
        """The inputs in whose memory an elementwise call may write, tried on a copy of each."""
        assert isinstance(node.target, torch._ops.OpOverload)
        if torch.Tag.pointwise not in node.target.tags:
            return []
        found = []
        for source in node.all_input_nodes:
            given = self.env[source]
            if not isinstance(given, Tensor) or _layout(given) != _layout(value):
                continue
            place = given.clone()
            swapped = fx.node.map_aggregate(args, lambda a, g=given, p=place: p if a is g else a)
            if _runs(run, place, swapped, kwargs) and same_bits(place, value):
                found.append(source.name)
        return found

    def facts(self, allocations: Allocations) -> dict[str, CallFacts]:
        """The facts by node name; the way with the least workspace wins."""
        used = allocations.sections
        facts: dict[str, CallFacts] = {}
        for name in self.trace.views:
            own = sum(
                info.bytes for info in self.trace.storages
                if info.maker == name and info.origin == "made"
            )  # fmt: skip
            plain = max(used[f"plain {name}"].peak - own, 0)
            best = min(
                self._ways.get(name, []), key=lambda way: used[f"{way} {name}"].peak, default=""
            )
            facts[name] = CallFacts(
                best,
                used[f"{best} {name}"].peak if best else 0,
                plain,
                tuple(self._takes.get((best, name), ())),
            )
        return facts


def _runs(run: Any, place: Tensor, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a way accepts the arguments at all, and leaves the place where it is."""
    where, shape = place.data_ptr(), place.shape
    try:
        run(place, *args, **kwargs)
    except (RuntimeError, TypeError, ValueError):
        # Torch refuses layouts, dtypes and missing kernels as RuntimeError, arguments that a
        # variant lacks as TypeError; mopt's own operators refuse shapes as ValueError.
        return False
    return place.data_ptr() == where and place.shape == shape


def _packed(way: Way, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """The packed arguments, None where a weight is no constant or cannot be packed."""
    computed: list[fx.Node] = []
    fx.map_arg(node.args[1:], lambda n: computed.append(n) if n.op != "get_attr" else None)
    if computed or kwargs or way.pack is None:
        return None
    try:
        return way.pack(*args)
    except (RuntimeError, TypeError):
        return None  # strings for padding, or a build of torch without oneDNN


def _is_plain(value: Tensor) -> bool:
    """A dense CPU tensor that fills its storage, so that strides alone say where it lies."""
    if value.layout != torch.strided or value.device.type != "cpu" or not value.numel():
        return False
    if value.is_conj() or value.is_neg() or value.storage_offset():
        return False
    return value.untyped_storage().nbytes() == value.numel() * value.element_size()


def _layout(value: Tensor) -> tuple[Any, ...]:
    return (value.shape, value.stride(), value.dtype, value.storage_offset())


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits (NaN equals itself)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.is_floating_point() or left.is_complex():
        return bool(torch.equal(_bits(left), _bits(right)))
    return bool(torch.equal(left, right))


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)
