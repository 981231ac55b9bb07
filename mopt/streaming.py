"""Calibration data on its way through a program, stopped before one layer after another.

Every node runs once per batch. Between stops only the values that later nodes still read are held,
so a calibration of a whole model needs the memory of one cut through it, and layers behind the
cut see what the rounded layers before it give.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mopt.calibration import Call
from mopt.errors import InputError, LimitError
from mopt.machine import trim_heap
from mopt.pass_base import PassContext
from mopt.program import Program, site_of


class Stream:
    """All calibration batches at one point of a program's graph.

    The graph must not be edited while the stream is in use. ``held_bytes`` are those of the values
    that wait, ``peak_bytes`` the most that they and what :meth:`reserve` was told of took so far.
    """

    def __init__(self, program: Program, calls: Iterable[Call], ctx: PassContext) -> None:
        self._nodes = program.nodes
        self._index = {node: at for at, node in enumerate(self._nodes)}
        self._interpreter = fx.Interpreter(program.graph_module)
        self._ctx = ctx
        self._weights: dict[tuple[fx.Node, fx.Node], Tensor] = {}
        self._position = 0
        self.held_bytes = self.peak_bytes = 0
        self._dies: list[list[fx.Node]] = [[] for _ in self._nodes]
        for at, node in enumerate(self._nodes):
            self._dies[max([at, *(self._index[user] for user in node.users)])].append(node)
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._batches: list[dict[fx.Node, Any]] = [
            dict(zip(inputs, program.flat_inputs(args, kwargs), strict=True))
            for args, kwargs in calls
        ]

    @property
    def batches(self) -> int:
        """How many batches are on their way."""
        return len(self._batches)

    def replace_weight(self, calls: Sequence[fx.Node], reader: fx.Node, tensor: Tensor) -> None:
        """Let ``calls`` compute with ``tensor`` where they read ``reader`` from now on."""
        for call in calls:
            for argument in call.all_input_nodes:
                if argument.op == "get_attr" and argument.target == reader.target:
                    self._weights[call, argument] = tensor

    def advance(self, until: fx.Node) -> None:
        """Run every batch up to, and without, ``until``; never backwards."""
        stop = self._index[until]
        assert stop >= self._position, f"{until.name} is behind the stream"
        held = 0
        with torch.no_grad():
            for batch in self._batches:
                self._ctx.check_time("calibrating")
                for at in range(self._position, stop):
                    self._step(batch, at)
                held += _tensor_bytes(batch.values())
        self._forget(self._position, stop)
        trim_heap()
        self._position, self.held_bytes = stop, held
        self.reserve(0, f"calibration before {site_of(until)}")

    def reserve(self, more_bytes: int, what: str) -> None:
        """Count what is held beside the values that wait, such as the statistics of a layer.

        Raises LimitError where both are more than a compile may hold. ``what`` holds them.
        """
        held, limit = self.held_bytes + more_bytes, self._ctx.max_memory_bytes
        self.peak_bytes = max(self.peak_bytes, held)
        if limit is not None and held > limit:
            raise LimitError(
                f"{what} holds {held / 1e6:.1f} MB of activations and statistics, "
                f"more than the limit of {limit / 1e6:.1f} MB",
                code="max-memory",
                hint="give fewer or smaller calibration batches, or raise --max-memory",
            )

    def values(self, node: fx.Node) -> list[Tensor]:
        """The value of ``node`` in every batch. It must have run and be read by a later node.

        Raises InputError if one of them holds NaN or infinity.
        """
        found = [batch[node] for batch in self._batches]
        tensors = [value for value in found if isinstance(value, Tensor)]  # sizes are numbers
        if not all(bool(torch.isfinite(value).all()) for value in tensors):
            raise InputError(
                f"the value of node {node.name!r} holds NaN or infinity on calibration data",
                code="non-finite-activation",
                site=site_of(node),
                hint="run the model on this data and look for the layer that overflows",
            )
        return found

    def second_moment(self, node: fx.Node) -> Tensor:
        """The mean of x x^T over all rows x of a value's last axis, (K, K) float32."""
        values = self.values(node)
        width = values[0].shape[-1]
        self.reserve(4 * width**2, f"the second moment of {node.name!r}")
        total = torch.zeros(width, width, device=values[0].device)
        rows = 0
        for value in values:
            flat = value.detach().reshape(-1, width).float()
            total.addmm_(flat.t(), flat)
            rows += len(flat)
        return total.div_(max(rows, 1))

    def replace_value(self, node: fx.Node, tensor: Tensor) -> None:
        """Let the nodes still to come see ``tensor`` as the value of ``node`` in every batch."""
        for batch in self._batches:
            batch[node] = tensor

    def shift(self, node: fx.Node, offset: Tensor) -> None:
        """Add ``offset`` to the value of ``node`` in every batch, for the nodes still to come."""
        for batch in self._batches:
            batch[node] = batch[node] + offset

    def drift(self, node: fx.Node, original: Stream) -> Tensor:
        """The mean of (x - y) y^T over rows, x of ``original`` and y of this stream, (K, K)."""
        mine, theirs = self.values(node), original.values(node)
        width = mine[0].shape[-1]
        total = torch.zeros(width, width, device=mine[0].device)
        rows = 0
        for value, reference in zip(mine, theirs, strict=True):
            flat = value.detach().reshape(-1, width).float()
            total.addmm_((reference.detach().reshape(-1, width).float() - flat).t(), flat)
            rows += len(flat)
        return total.div_(max(rows, 1))

    def _step(self, batch: dict[fx.Node, Any], at: int) -> None:
        node = self._nodes[at]
        if node.op not in ("placeholder", "get_attr", "output"):
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda n: self._load(batch, node, n)
            )
            batch[node] = getattr(self._interpreter, node.op)(node.target, args, kwargs)
        for dead in self._dies[at]:
            batch.pop(dead, None)

    def _forget(self, start: int, stop: int) -> None:
        """Let go of replaced weights whose calls lie behind."""
        passed = set(self._nodes[start:stop])
        self._weights = {key: kept for key, kept in self._weights.items() if key[0] not in passed}

    def _load(self, batch: dict[fx.Node, Any], user: fx.Node, node: fx.Node) -> Any:
        if node.op != "get_attr":
            return batch[node]
        replaced = self._weights.get((user, node))
        return self._interpreter.get_attr(node.target, (), {}) if replaced is None else replaced


def _tensor_bytes(values: Iterable[Any]) -> int:
    """Bytes of the distinct memory behind tensors."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in values
        if isinstance(value, Tensor)
    }
    return sum(storages.values())
