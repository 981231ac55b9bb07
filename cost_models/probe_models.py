"""Small ONNX models that hold one operator several times, to be timed.

A probe is a family of operators and a tuple of sizes. Its model applies the operator ``copies``
times, each with weights of its own, to values near at hand, so that weights come from as far away
and activations from as near as they do in a real model. Operators that keep the shape of their
input form a chain. Of the results of others a single value is kept (a *tap*, which costs what
a probe of its own measures), because a runtime drops what nobody uses.

Built with ONNX's own helpers, without torch, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

OPSET = 23
# Families of pieces of networks, which are timed as a whole, however long they take.
PIECES = "chain."
IR_VERSION = 11
MICROSOFT = "com.microsoft"
Dims = tuple[int, ...]


class ProbeModel:
    """A model under construction: its inputs, and how many taps it has."""

    def __init__(self, copies: int) -> None:
        self.copies = copies
        self.inputs: dict[str, np.ndarray] = {}
        self.taps = 0
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._tapped: list[str] = []
        self._random = np.random.default_rng(0)

    def give(self, *shape: int, dtype: str = "float32") -> str:
        """A new input of the model."""
        name = f"x{len(self.inputs)}"
        self.inputs[name] = self._values(shape, dtype)
        return name

    def give_indices(self, *shape: int, below: int) -> str:
        """A new input of whole numbers from 0 to below ``below``."""
        name = f"x{len(self.inputs)}"
        self.inputs[name] = self._random.integers(0, below, shape, dtype=np.int64)
        return name

    def store(self, *shape: int, dtype: str = "float32") -> str:
        """A new weight."""
        return self.constant(self._values(shape, dtype))

    def constant(self, value: Any) -> str:
        """A stored value."""
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def scale(self, *shape: int) -> str:
        """Steps of a quantized value."""
        return self.constant(np.full(shape, 0.01, np.float32))

    def _values(self, shape: Dims, dtype: str) -> np.ndarray:
        if dtype == "float32":
            return self._random.standard_normal(shape, dtype=np.float32)
        limits = np.iinfo(dtype)
        return self._random.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)

    def add(
        self, operator: str, *inputs: str, domain: str = "", results: int = 1, **attributes: Any
    ) -> str:
        """A node; the name of its first result. An empty name leaves an input out."""
        return self.add_all(operator, *inputs, domain=domain, results=results, **attributes)[0]

    def add_all(
        self, operator: str, *inputs: str, domain: str = "", results: int = 1, **attributes: Any
    ) -> list[str]:
        """A node; the names of its results."""
        at = len(self._nodes)
        names = [f"v{at}_{i}" for i in range(results)]
        self._nodes.append(
            helper.make_node(operator, inputs, names, name=f"n{at}", domain=domain, **attributes)
        )
        return names

    def tap(self, value: str, rank: int) -> None:
        """Keep ``value`` from being dropped: its first element becomes part of the output."""
        self.taps += 1
        self.tap_at(value, (0,) * rank)

    def tap_at(self, value: str, place: Dims) -> None:
        """Make one element part of the output, not counted among the taps."""
        # Of all ways to take an element, only this one is not moved ahead of a Transpose or a
        # DequantizeLinear, which would then have one element to work on.
        index = self.constant(np.array([place], np.int64))
        self._tapped.append(self.add("GatherND", value, index))

    def finish(self, last: str | None = None, kind: str = "float32") -> bytes:
        """The serialized model; its output is ``last``, or the taps put together."""
        if last is None:
            last = self.add("Concat", *self._tapped, axis=0)
        inputs = [
            helper.make_tensor_value_info(name, _type(value.dtype), value.shape)
            for name, value in self.inputs.items()
        ]
        output = helper.make_tensor_value_info(last, _type(np.dtype(kind)), None)
        graph = helper.make_graph(self._nodes, "probe", inputs, [output], self._weights)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR_VERSION,
        )
        serialized: bytes = model.SerializeToString()
        return serialized


def _type(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))


Build = Callable[[ProbeModel, Dims], bytes]
_builders: dict[str, Build] = {}


def builds(*families: str) -> Callable[[Build], Build]:
    """Register a function that adds ``copies`` operators of a family to a model."""

    def register(function: Build) -> Build:
        for family in families:
            _builders[family] = function
        return function

    return register


def same_pads(*kernel: int) -> list[int]:
    """Padding that keeps the size, as ONNX writes it."""
    before = [(size - 1) // 2 for size in kernel]
    return [*before, *(size - 1 - pad for size, pad in zip(kernel, before, strict=True))]


def build_probe(family: str, dims: Dims, copies: int) -> tuple[bytes, dict[str, np.ndarray], int]:
    """The serialized model of a probe, its inputs and its number of taps."""
    model = ProbeModel(copies)
    built = builders()[family](model, dims)
    return built, model.inputs, model.taps


@cache
def builders() -> dict[str, Build]:
    """Every builder by family."""
    for module in ("probe_chains", "probe_layers", "probe_values"):
        import_module(f"mopt.cost_models.{module}")
    return _builders
