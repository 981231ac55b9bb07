"""Check a stranger's ONNX model before any runtime sees it.

The rules: one plain graph of operators that mopt's own lowering emits, within the ``onnx_*``
limits, its weights inside the file or in the one file beside it (``external.py``), no value with a
fixed shape beyond 2 GiB and none with more than 64 dimensions. What passes may still be a bad
model, but not one that makes the runtime run out of memory or stack while it loads.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mopt.backends.onnx.folding import folding_is_bounded
from mopt.backends.onnx.ranks import MOST_DIMENSIONS, first_deep_value
from mopt.backends.onnx.wire import ELEMENT_BITS, Outline, tensor_bytes
from mopt.errors import LimitError, MoptError, quote
from mopt.limits import DEFAULT_LIMITS, Limits
from mopt.safe_read import OpenFile

if TYPE_CHECKING:
    import onnx

Operator = tuple[str, str]

# AttributeProto.type and the one field that then holds the content.
_CONTENTS = {1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 8: "strings"}
_TENSOR, _SUBGRAPH = 4, 5
_NUMBERS = frozenset({1, 2})
_ABOUT = frozenset({"name", "type", "doc_string"})


@dataclass(frozen=True)
class CheckedModel:
    """A model that may be loaded; with constant folding only if ``may_fold``."""

    nodes: int
    may_fold: bool


def check_model(
    file: OpenFile,
    outline: Outline,
    *,
    operators: frozenset[Operator] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> CheckedModel:
    """Check the model whose ``outline`` was scanned; ``operators`` are (domain, type) pairs.

    Without ``operators``, those of ``mopt.backends.onnx.operators`` are allowed. Raises the file's
    error class (``onnx-format``, ``onnx-forbidden``) or LimitError (``onnx-too-large``).
    """
    import onnx
    from google.protobuf.message import DecodeError

    if operators is None:
        from mopt.backends.onnx.operators import OPERATORS

        operators = OPERATORS
    try:
        model = onnx.ModelProto.FromString(outline.skeleton)
    except (DecodeError, RecursionError) as e:
        raise file.error(f"{file.name} is not an ONNX model: {e}", code="onnx-format") from e
    walker = _Walker(file, operators, limits)
    walker.check_header(model)
    walker.check_values([*model.graph.input, *model.graph.output, *model.graph.value_info])
    walker.check_names(model.graph, outline)
    walker.check_nodes(model.graph, depth=0)
    deep = first_deep_value(model.graph, walker.tick)
    if deep is not None:
        raise walker.too_large(f"has the value {quote(deep)} of over {MOST_DIMENSIONS} dimensions")
    weights = sum(tensor.nbytes for tensor in outline.initializers)
    may_fold = folding_is_bounded(
        model, len(outline.skeleton) + weights, tick=walker.tick, limits=limits
    )
    return CheckedModel(walker.nodes, may_fold)


class _Walker:
    def __init__(self, file: OpenFile, operators: frozenset[Operator], limits: Limits) -> None:
        self.file = file
        self.operators = operators
        self.limits = limits
        self.nodes = 0
        self.ticks = 0
        self.deadline = time.monotonic() + limits.parse_seconds

    def forbidden(self, what: str) -> MoptError:
        return self.file.error(f"{self.file.name} {what}", code="onnx-forbidden")

    def too_large(self, what: str) -> LimitError:
        return LimitError(f"{self.file.name} {what}", code="onnx-too-large")

    def tick(self) -> None:
        """Called for every node of every walk; ends what takes too long."""
        self.ticks += 1
        if not self.ticks % 1024 and time.monotonic() > self.deadline:
            raise self.too_large(f"took over {self.limits.parse_seconds} s to check")

    def check_header(self, model: onnx.ModelProto) -> None:
        domains = {domain for domain, _ in self.operators}
        seen: set[str] = set()
        for opset in model.opset_import:
            domain = opset.domain
            if domain not in domains or domain in seen or not 1 <= opset.version <= 1 << 16:
                raise self.forbidden(
                    f"imports version {opset.version} of the operators {quote(opset.domain)}, "
                    f"expected one version each of {quote(sorted(domains))}"
                )
            seen.add(domain)
        if len(model.graph.quantization_annotation):
            raise self.forbidden("holds quantization annotations")

    def check_values(self, values: Iterable[onnx.ValueInfoProto]) -> None:
        """Types and fixed shapes of declared values."""
        for value in values:
            kind = value.type.WhichOneof("value")
            tensor = value.type.tensor_type
            if kind not in ("tensor_type", None) or (
                kind and tensor.elem_type not in (*ELEMENT_BITS, 0)
            ):
                raise self.forbidden(f"has the value {quote(value.name)} that is not a tensor")
            sizes = [d.dim_value for d in tensor.shape.dim if d.HasField("dim_value")]
            if len(tensor.shape.dim) > MOST_DIMENSIONS or any(size < 0 for size in sizes):
                raise self.too_large(f"has the value {quote(value.name)} of impossible shape")
            nbytes = tensor_bytes(tensor.elem_type or 1, sizes)
            if nbytes is None or nbytes > self.limits.onnx_value_bytes:
                raise self.too_large(
                    f"has the value {quote(value.name)} of shape {quote(sizes)}, at most "
                    f"{self.limits.onnx_value_bytes} bytes are allowed"
                )

    def check_names(self, graph: onnx.GraphProto, outline: Outline) -> None:
        ports = len(graph.input) + len(graph.output)
        if ports > self.limits.onnx_ports:
            raise self.too_large(f"has {ports} inputs and outputs")
        names = [value.name for value in graph.input]
        names += [tensor.name for tensor in outline.initializers]
        name, count = Counter(names).most_common(1)[0] if names else ("", 0)
        if count > 1:
            raise self.forbidden(f"uses the name {quote(name)} for {count} inputs or weights")
        for value in graph.input:
            if not value.type.tensor_type.HasField("shape"):
                raise self.forbidden(f"does not say how many sizes input {quote(value.name)} has")

    def check_nodes(self, graph: onnx.GraphProto, depth: int) -> None:
        """Operators and attributes, subgraphs included."""
        if depth > self.limits.onnx_depth:
            raise self.too_large(f"has subgraphs deeper than {self.limits.onnx_depth}")
        for node in graph.node:
            self.nodes += 1
            if self.nodes > self.limits.onnx_nodes:
                raise self.too_large(f"has more than {self.limits.onnx_nodes} nodes")
            self.tick()
            # "ai.onnx" would mean the same as "", but two names for one thing are one too many.
            if (node.domain, node.op_type) not in self.operators:
                raise self._unknown_operators(graph)
            if node.overload:
                raise self.forbidden(f"calls the overload {quote(node.overload)}")
            for attribute in node.attribute:
                self._check_attribute(node, attribute, depth)

    def _unknown_operators(self, graph: onnx.GraphProto) -> MoptError:
        used = {(node.domain, node.op_type) for node in graph.node}
        names = sorted(f"{d}::{t}" if d else str(t) for d, t in used - self.operators)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        error = self.forbidden(
            f"uses operators that mopt does not write: {quote(names[:5], 200)}{more}"
        )
        error.hint = "only artifacts made by mopt are loaded; compile the model with mopt"
        return error

    def _check_attribute(
        self, node: onnx.NodeProto, attribute: onnx.AttributeProto, depth: int
    ) -> None:
        where = f"in attribute {quote(attribute.name)} of {node.op_type}"
        if attribute.ref_attr_name or attribute.type not in _CONTENTS:
            raise self.forbidden(f"holds something else than numbers, text and tensors {where}")
        # One kind of content each: a reader that looks at another field would see other content.
        filled = {field.name for field, _ in attribute.ListFields()} - _ABOUT
        if not filled <= {_CONTENTS[attribute.type]}:
            raise self.forbidden(f"holds contents of two kinds {where}")
        if attribute.type == _SUBGRAPH:
            self.check_values([*attribute.g.input, *attribute.g.output, *attribute.g.value_info])
            for tensor in attribute.g.initializer:
                self._check_tensor(tensor, where)
            if len(attribute.g.sparse_initializer) or len(attribute.g.quantization_annotation):
                raise self.forbidden(f"holds sparse or annotated tensors {where}")
            self.check_nodes(attribute.g, depth + 1)
            return
        if attribute.type not in _NUMBERS and attribute.ByteSize() > self.limits.onnx_attribute:
            raise self.too_large(f"holds over {self.limits.onnx_attribute} bytes {where}")
        if attribute.type == _TENSOR:
            self._check_tensor(attribute.t, where)

    def _check_tensor(self, tensor: onnx.TensorProto, where: str) -> None:
        if tensor.data_location or len(tensor.external_data) or tensor.HasField("segment"):
            raise self.forbidden(f"points to another file {where}")
        nbytes = None
        if tensor.data_type in ELEMENT_BITS and len(tensor.dims) <= self.limits.tensor_rank:
            nbytes = tensor_bytes(tensor.data_type, tuple(tensor.dims))
        if nbytes is None or nbytes > self.limits.onnx_attribute:
            raise self.forbidden(
                f"holds a tensor of type {tensor.data_type} and shape {quote(list(tensor.dims))} "
                f"{where}"
            )
        if tensor.HasField("raw_data") and len(tensor.raw_data) != nbytes:
            raise self.forbidden(
                f"holds {len(tensor.raw_data)} bytes of a tensor of {nbytes} {where}"
            )
