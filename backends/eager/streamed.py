"""Runs a graph whose weights stay on disk: a thread reads ahead what the next calls need.

The calls are cut into stretches by the bytes of the weights they read. While one stretch runs, the
weights of the next ones are read from the artifact, as many as fit into the given memory; after
its last call a stretch gives its weights up. Embedding tables are mapped: only the rows that are
looked up are read.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mopt.errors import ArtifactError, UsageError
from mopt.safetensors_files import SafetensorsHeader, TensorInfo

# Kernels pick their path by alignment; this is what PyTorch's allocator gives.
_ALIGNMENT = 64
# So many stretches share the memory: one runs, the others are read ahead.
_AHEAD = 3
_EMBEDDING = torch.ops.aten.embedding.default


@dataclass
class Stretch:
    """Nodes that run together, and the weights read for them with the bytes they take."""

    nodes: list[fx.Node] = field(default_factory=list)
    weights: dict[fx.Node, TensorInfo] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True)
class StoredWeight:
    """A weight as a graph reads it: where it is stored, and how the tensor must look."""

    info: TensorInfo
    dtype: torch.dtype
    requires_grad: bool
    channels_last: bool
    mapped: Tensor


class StreamedGraph:
    """A graph that holds at most ``limit`` bytes of weights at once, embedding tables aside.

    ``weights`` says for every ``get_attr`` node where its weight is stored in the file ``fd``,
    which the object owns from now on. Raises UsageError (``resident-too-small``) where one
    operator's weights are larger than the limit. One run at a time; :meth:`close` ends the thread.
    """

    def __init__(
        self,
        graph: fx.Graph,
        weights: Mapping[fx.Node, StoredWeight],
        header: SafetensorsHeader,
        fd: int,
        limit: int,
    ) -> None:
        self._graph, self._weights, self._fd, self._limit = graph, weights, fd, limit
        self._start = header.data_start
        self.stretches = _stretches(graph, weights, limit)
        largest = max((s.bytes for s in self.stretches), default=0)
        if largest > limit:
            os.close(fd)
            raise UsageError(
                f"{limit} bytes of weights cannot be resident: one operator reads {largest}",
                code="resident-too-small",
                hint=f"allow at least {largest} bytes",
            )
        self._dies = _last_uses(graph)
        self._room = threading.Condition()
        self._resident = self.peak_resident = 0
        self._ready: queue.Queue[dict[fx.Node, Tensor] | Exception] = queue.Queue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._read_ahead, name="mopt-weights", daemon=True)
        self._thread.start()

    def __call__(self, *inputs: Any) -> Any:
        """The flat outputs for flat inputs."""
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        done = 0
        try:
            for stretch in self.stretches:
                arrived = self._ready.get()
                done += 1
                if isinstance(arrived, Exception):
                    self._ready.put(arrived)
                    raise ArtifactError(
                        f"the weights can no longer be read: {arrived}", code="weights-gone"
                    ) from arrived
                values.update(arrived)
                del arrived
                self._run(stretch, values, given)
                for weight in stretch.weights:
                    del values[weight]
                self._change(-stretch.bytes)
        except BaseException:
            self._skip(done)
            raise
        return values[self._graph.output_node()]

    def _run(self, stretch: Stretch, values: dict[fx.Node, Any], given: Iterator[Any]) -> None:
        for node in stretch.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "output":
                values[node] = fx.map_arg(node.args[0], values.__getitem__)
            else:
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = fx.map_arg(node.kwargs, values.__getitem__)
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
            for dead in self._dies[node]:
                values.pop(dead, None)

    def _skip(self, done: int) -> None:
        """After a failed run: take what was read for the rest of it, so that the next one begins
        with the first stretch."""
        if done:
            self._change(-self.stretches[done - 1].bytes)
        for stretch in self.stretches[done:]:
            if isinstance(failed := self._ready.get(), Exception):
                self._ready.put(failed)
                return
            self._change(-stretch.bytes)

    def close(self) -> None:
        """Stop reading and give the file up."""
        with self._room:
            self._is_closed = True
            self._room.notify_all()
        self._thread.join()

    def _change(self, count: int) -> None:
        with self._room:
            self._resident += count
            self.peak_resident = max(self.peak_resident, self._resident)
            self._room.notify_all()

    def _read_ahead(self) -> None:
        try:
            while True:
                for stretch in self.stretches:
                    with self._room:
                        while not (self._is_closed or self._fits(stretch)):
                            self._room.wait()
                        if self._is_closed:
                            return
                    self._change(stretch.bytes)
                    self._ready.put(self._read(stretch))
        except (OSError, ArtifactError) as error:
            self._ready.put(error)
        finally:
            os.close(self._fd)

    def _fits(self, stretch: Stretch) -> bool:
        waiting = self._ready.qsize()
        return self._resident + stretch.bytes <= self._limit and waiting < len(self.stretches)

    def _read(self, stretch: Stretch) -> dict[fx.Node, Tensor]:
        memory = torch.empty(stretch.bytes, dtype=torch.uint8)
        raw = memoryview(memory.numpy())
        found: dict[fx.Node, Tensor] = {}
        at = 0
        for node, info in stretch.weights.items():
            size = info.stop - info.start
            _read_into(self._fd, raw[at : at + size], self._start + info.start)
            stored = self._weights[node]
            tensor = memory[at : at + size].view(stored.dtype).view(info.shape)
            if stored.channels_last:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            found[node] = tensor.requires_grad_(True) if stored.requires_grad else tensor
            at += _rounded(size)
        for node in stretch.nodes:
            for weight in node.all_input_nodes:
                if weight.op == "get_attr" and weight not in stretch.weights:
                    found[weight] = self._weights[weight].mapped
        return found


def _read_into(fd: int, target: memoryview, offset: int) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(fd, [target[done:]], offset + done)
        if not count:
            raise ArtifactError(
                f"the weights end at byte {offset + done}, the header says more",
                code="file-truncated",
            )
        done += count


def _stretches(
    graph: fx.Graph, weights: Mapping[fx.Node, StoredWeight], limit: int
) -> list[Stretch]:
    found = [Stretch()]
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        needed = [
            w for w in node.all_input_nodes
            if w.op == "get_attr" and not (node.target is _EMBEDDING and node.args[0] is w)
        ]  # fmt: skip
        new = {w: weights[w].info for w in needed if w not in found[-1].weights}
        size = sum(_rounded(info.stop - info.start) for info in new.values())
        if found[-1].weights and new and found[-1].bytes + size > limit // _AHEAD:
            found.append(Stretch())
            new = {w: weights[w].info for w in needed}
            size = sum(_rounded(info.stop - info.start) for info in new.values())
        found[-1].nodes.append(node)
        found[-1].weights.update(new)
        found[-1].bytes += size
    return found


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node the values that nobody reads after it."""
    dies: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}
    seen: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        for value in (node, *node.all_input_nodes):
            if value not in seen:
                seen.add(value)
                if value.op not in ("get_attr", "output"):
                    dies[node].append(value)
    return dies
