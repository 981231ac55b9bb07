"""A bound on what ONNX Runtime's constant folding may create while it loads a model.

Folding runs every operator whose inputs are constants. Some make large values from small ones: 77
bytes of model (a ConstantOfShape) take 383 MB. ``folding_is_bounded`` follows values through the
graph; what may be a constant of a size it cannot tell counts as unbounded, and such a model is
loaded without folding. Models whose weights are laid out when they are made lose nothing by that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mopt.backends.onnx.shapes import first_output
from mopt.backends.onnx.values import (
    VARIES,
    UnboundedError,
    Value,
    value_of_constant,
    value_of_input,
    value_of_tensor,
)
from mopt.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    import onnx

_FOLD_RATIO = 64


def folding_is_bounded(
    model: onnx.ModelProto,
    model_bytes: int,
    *,
    tick: Callable[[], None],
    limits: Limits = DEFAULT_LIMITS,
) -> bool:
    """Whether constant folding makes at most ``fold_bytes`` plus 64 times the model's size.

    Half a byte of code takes 27 to become a float of a table (index, value, product, layout).

    ``model`` may be a skeleton (large initializers without their bytes); ``model_bytes`` counts
    all weights. No value may have more than 64 dimensions. ``tick`` is called for every node.
    """
    folding = _Folding(limits.fold_bytes + _FOLD_RATIO * model_bytes, tick)
    try:
        inputs = {declared.name: value_of_input(declared) for declared in model.graph.input}
        folding.walk(model.graph, inputs)
    except UnboundedError:
        return False
    return True


class _Folding:
    """One walk over a graph and its subgraphs; UnboundedError when it is too much or unknown."""

    def __init__(self, most: int, tick: Callable[[], None]) -> None:
        self.most = most
        self.tick = tick
        self.made = 0

    def walk(self, graph: onnx.GraphProto, given: Mapping[str, Value]) -> None:
        """``given`` are the values the graph sees from outside."""
        known = dict(given)
        for tensor in graph.initializer:
            known[tensor.name] = value_of_tensor(tensor)
        for node in graph.node:
            self.tick()
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    # What a subgraph is called with is not known, whatever it declares.
                    called = {declared.name: Value() for declared in attribute.g.input}
                    self.walk(attribute.g, {**known, **called})
            first = self._first_output(node, known)
            if not node.output:
                continue
            known[node.output[0]] = first
            if len(node.output) > 1:
                # Other outputs of the operators that fold are at most as large as the first.
                other = replace(first, shape=None, contents=None)
                known.update(dict.fromkeys(node.output[1:], other))
            if first.is_constant and node.op_type != "Constant":
                self.made += first.nbytes * len(node.output)
            if self.made > self.most:
                raise UnboundedError

    def _first_output(self, node: onnx.NodeProto, known: Mapping[str, Value]) -> Value:
        if node.op_type == "Constant" and not node.domain:
            return value_of_constant(node)
        inputs = [known.get(name, Value()) if name else Value() for name in node.input]
        result = first_output(node, inputs)
        if node.op_type in ("Shape", "Size") and not node.domain:
            is_constant = VARIES not in (result.contents or ())
        else:
            given = [value for name, value in zip(node.input, inputs, strict=True) if name]
            is_constant = bool(given) and all(value.is_constant for value in given)
        if is_constant == result.is_constant:
            return result
        return Value(result.shape, result.contents, is_constant, result.elements, result.width)
