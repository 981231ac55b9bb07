"""The operators that ONNX Runtime really executes for a model, after its fusions, with all sizes.

The model is loaded once with the session options of the backend, the graph that the runtime made of
it is written out, and one run with profiling on tells the sizes of every value, also where they
depend on the data. Times of that run are not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopt.cost_models.executed_run import GRAPH, run_once
from mopt.disk import scratch

Shape = tuple[int, ...]
# Bytes of one value, by the type names of the runtime's profiler.
_BYTES = {
    "float": 4.0, "float16": 2.0, "bfloat16": 2.0, "double": 8.0, "bool": 1.0, "int8": 1.0,
    "uint8": 1.0, "int16": 2.0, "uint16": 2.0, "int32": 4.0, "uint32": 4.0, "int64": 8.0,
    "uint64": 8.0, "int4": 0.5, "uint4": 0.5, "int2": 0.25, "uint2": 0.25,
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """An input or output of an operator; ``name`` of the weight that it is, if it is one."""

    type: str
    shape: Shape
    weight: str = ""

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> float:
        """Bytes of all elements."""
        return self.count * _BYTES.get(self.type, 4.0)


@dataclass(frozen=True)
class ExecutedNode:
    """One operator, once for each time it runs. Missing optional inputs are None."""

    name: str
    operator: str
    domain: str
    attributes: Mapping[str, Any]
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]

    @property
    def weights(self) -> list[Value]:
        """The inputs that are stored in the model."""
        return [value for value in self.inputs if value is not None and value.weight]

    def size(self, index: int) -> Shape:
        """The shape of an input."""
        value = self.inputs[index]
        assert value is not None
        return value.shape


@dataclass(frozen=True)
class ExecutedModel:
    """All operators in the order they ran in, and what a run takes in and gives back.

    ``arena_bytes`` is what the runtime held for activations and its own copies of weights.
    """

    nodes: tuple[ExecutedNode, ...]
    input_bytes: tuple[float, ...]
    output_bytes: tuple[float, ...]
    weight_bytes: float
    arena_bytes: int


def executed_model(
    model: str | os.PathLike[str],
    inputs: Mapping[str, np.ndarray] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> ExecutedModel:
    """What ONNX Runtime executes for the ONNX file ``model`` on ``inputs``.

    Without inputs, zeros of the declared shapes are taken; ``sizes`` gives values to named
    dimensions, the others are 1. Raises ArtifactError ``onnx-load-failed`` or InputError
    ``onnx-run-failed``.
    """
    import onnx

    with scratch("mopt-graph") as folder:
        run = run_once(Path(model), Path(folder), inputs, sizes or {})
        graph = onnx.load(str(Path(folder) / GRAPH), load_external_data=False).graph
    return ExecutedModel(
        nodes=tuple(_Graph(graph).nodes(run.events)),
        input_bytes=tuple(run.input_bytes),
        output_bytes=tuple(run.output_bytes),
        weight_bytes=sum(_weight_bytes(tensor) for tensor in graph.initializer),
        arena_bytes=max(
            (int(e["args"].get("mem_arena_held", 0)) for e in _runs(run.events)), default=0
        ),
    )


def _runs(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            yield event


class _Graph:
    """The graph as the runtime wrote it: its nodes by name, and its weights."""

    def __init__(self, graph: Any) -> None:
        self._nodes: dict[str, list[Any]] = {}
        self._weights: dict[str, Value] = {}
        self._served: dict[str, int] = {}
        self._collect(graph)

    def _collect(self, graph: Any) -> None:
        from onnx import TensorProto

        for tensor in graph.initializer:
            kind = TensorProto.DataType.Name(tensor.data_type).lower()
            self._weights[tensor.name] = Value(kind, tuple(tensor.dims), tensor.name)
        for node in graph.node:
            self._nodes.setdefault(node.name, []).append(node)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    self._collect(attribute.g)

    def nodes(self, events: list[dict[str, Any]]) -> Iterator[ExecutedNode]:
        """Each run of an operator with its node in the graph."""
        for event in _runs(events):
            name = event["name"].removesuffix("_kernel_time")
            found = self._nodes.get(name, [])
            # Fusions may give several nodes one name; they run in the order they are written in.
            turn = self._served.get(name, 0)
            self._served[name] = turn + 1
            node = found[turn % len(found)] if found else None
            yield self._executed(name, node, event["args"])

    def _executed(self, name: str, node: Any, facts: dict[str, Any]) -> ExecutedNode:
        from onnx import helper

        operator = facts["op_name"]
        outputs = tuple(_values(facts.get("output_type_shape", [])))
        seen = _values(facts.get("input_type_shape", []))
        if node is None:
            return ExecutedNode(name, operator, "", {}, tuple(seen), outputs)
        attributes = {
            a.name: helper.get_attribute_value(a) for a in node.attribute if not a.HasField("g")
        }
        inputs = tuple(self._inputs(node, seen))
        return ExecutedNode(name, operator, node.domain, attributes, inputs, outputs)

    def _inputs(self, node: Any, seen: list[Value]) -> Iterator[Value | None]:
        """The profiler leaves out weights that a kernel keeps in a layout of its own."""
        at = 0
        for name in node.input:
            weight = self._weights.get(name)
            if not name:
                yield None
            elif weight is None:
                yield seen[at] if at < len(seen) else None
                at += 1
            else:
                if at < len(seen) and seen[at].shape == weight.shape:
                    at += 1
                yield weight


def _values(entries: list[dict[str, Any]]) -> list[Value]:
    return [Value(kind, tuple(shape)) for entry in entries for kind, shape in entry.items()]


def _weight_bytes(tensor: Any) -> float:
    from onnx import TensorProto

    kind = TensorProto.DataType.Name(tensor.data_type).lower()
    return float(np.prod(tensor.dims, dtype=np.int64)) * _BYTES.get(kind, 4.0)
