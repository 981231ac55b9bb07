"""Which storage every value of a program lies in: views, aliases, writes and outputs resolved.

A storage is the memory one call allocates; views, in-place results and parts of a list share it.
Sizes are those of the example inputs: a program with dynamic shapes is traced for these only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from mopt.program import Program

_NEEDS_VALUES = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException,
)  # fmt: skip


class Origin(StrEnum):
    """Who a storage belongs to: the caller, the program's weights, or the call that made it."""

    INPUT = "input"
    WEIGHT = "weight"
    MADE = "made"


@dataclass(frozen=True)
class View:
    """Where a tensor lies: its storage, first element, sizes, strides (in elements) and dtype."""

    storage: int
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of the elements, each counted once for every index that reaches it."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class StorageInfo:
    """One storage: the node that brought it, its bytes, and whose it is."""

    maker: str
    bytes: int
    origin: Origin


@dataclass(frozen=True)
class CallFacts:
    """How a backend runs a call, and what it allocates besides the result.

    ``call`` names the way it writes its one result to a given place ("" where it cannot), with
    ``placed_bytes`` of workspace then and ``plain_bytes`` where it allocates the result itself.
    ``takes`` are the inputs, by node name, in whose memory the result may be written.
    """

    call: str = ""
    placed_bytes: int = 0
    plain_bytes: int = 0
    takes: tuple[str, ...] = ()


@dataclass
class StorageTrace:
    """The storages of one run, and for every node the views its value consists of."""

    storages: list[StorageInfo] = field(default_factory=list)
    views: dict[str, tuple[View, ...]] = field(default_factory=dict)
    _known: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict, repr=False)

    def record(self, node: fx.Node, value: Any) -> None:
        """Take up what a node gave; call it while the storages of earlier values still live."""
        origin = {"placeholder": Origin.INPUT, "get_attr": Origin.WEIGHT}.get(node.op, Origin.MADE)
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        self.views[node.name] = tuple(self._view(node, leaf, origin) for leaf in leaves)

    def _view(self, node: fx.Node, tensor: Tensor, origin: Origin) -> View:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        # A new storage may lie where a freed one did.
        if known is None or known[0].expired():
            known = (StorageWeakRef(storage), len(self.storages))
            self._known[key] = known
            self.storages.append(StorageInfo(node.name, storage.nbytes(), origin))
        return View(
            known[1], int(tensor.storage_offset()), tuple(map(int, tensor.shape)),
            tuple(map(int, tensor.stride())), tensor.dtype,
        )  # fmt: skip

    def of(self, node: fx.Node) -> set[int]:
        """The storages that a node's own value lies in."""
        return {view.storage for view in self.views.get(node.name, ())}

    def touched(self, node: fx.Node) -> set[int]:
        """The storages a node reads, writes, makes or looks at."""
        found = self.of(node)
        for source in node.all_input_nodes:
            found |= self.of(source)
        return found

    def made_by(self, node: fx.Node) -> list[int]:
        """The storages that a call brought into being."""
        return [
            s for s in sorted(self.of(node))
            if self.storages[s].maker == node.name and self.storages[s].origin is Origin.MADE
        ]  # fmt: skip


def trace_storages(program: Program) -> StorageTrace:
    """The storages of a run on the example inputs.

    Nothing is computed, unless a size depends on values: then the program is run.
    """
    try:
        return _trace_shapes(program)
    except _NEEDS_VALUES:
        trace = StorageTrace()
        _Tracer(program.graph_module, trace.record, lambda tensor: tensor).start(program)
        return trace


def _trace_shapes(program: Program) -> StorageTrace:
    trace = StorageTrace()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _Tracer(program.graph_module, trace.record, mode.from_tensor).start(program)
    return trace


class _Tracer(fx.Interpreter):
    """Runs a graph on converted inputs and weights, and shows every value to ``record``."""

    def __init__(
        self,
        module: fx.GraphModule,
        record: Callable[[fx.Node, Any], None],
        convert: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._record, self._convert = record, convert

    def start(self, program: Program) -> None:
        flat = program.flat_inputs(program.args, program.kwargs)
        inputs = [self._convert(v) if isinstance(v, Tensor) else v for v in flat]
        with torch.no_grad():
            self.run(*inputs, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = self._convert(value.detach())
        if n.op != "output":
            self._record(n, value)
        return value


def graph_key(program: Program) -> str:
    """A hash of the graph that a memory plan belongs to: any edit makes another one."""
    return hashlib.sha256(program.text().encode()).hexdigest()
