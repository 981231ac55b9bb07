"""The last step of an export: one name, one order and one copy for everything in the file."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from mopt.signature import Signature

# The version ONNX released together with opset 23.
IR_VERSION = 11


def finish(model: ir.Model) -> None:
    """Make the serialized model depend on the graph and the weights only.

    Drops metadata, doc strings and unused initializers, stores equal weights once, and puts
    initializers in the order in which the graph reads them.
    """
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.RemoveUnusedFunctionsPass()(model)
    _declare_domains(model)
    _share_equal_initializers(model.graph)
    common_passes.TopologicalSortPass()(model)
    common_passes.NameFixPass()(model)
    _order_initializers(model.graph)
    _strip(model)


def name_sizes(model: ir.Model, signature: Signature) -> None:
    """Give the sizes that vary the names of the signature, wherever they occur."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, signature.inputs, strict=True):
        for found, wanted in zip(value.shape or (), spec.shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(wanted, str) and found.value:
                names.setdefault(found.value, wanted)

    def renamed(size: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(size, int) or not size.value:
            return size
        return ir.SymbolicDim(
            re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), size.value)
        )

    inner = (value for node in model.graph for value in node.outputs)
    for value in dict.fromkeys([*model.graph.inputs, *inner, *model.graph.outputs]):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size) for size in value.shape])


def _declare_domains(model: ir.Model) -> None:
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    versions = {domain: model.opset_imports.get(domain, 1) for domain in sorted(used | {""})}
    model.opset_imports.clear()
    model.opset_imports.update(versions)


def _share_equal_initializers(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    known: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        if value in outputs or value.const_value is None:
            continue
        kept = known.setdefault(_identity(value.const_value), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            graph.initializers.pop(str(value.name))


def _identity(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    # Over the values where they are: a table's bytes would be copied several times.
    values = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return tensor.dtype, tuple(tensor.shape.numpy()), hashlib.sha256(values.data).digest()


def _order_initializers(graph: ir.Graph) -> None:
    order: dict[ir.Value, None] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.inputs:
            if value is not None and value.is_initializer():
                order.setdefault(value)
    for value in graph.outputs:
        if value.is_initializer():
            order.setdefault(value)
    for name in list(graph.initializers):
        graph.initializers.pop(name)
    for value in order:
        graph.register_initializer(value)


def _strip(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.doc_string = None
    model.producer_name, model.producer_version = "mopt", None
    model.ir_version = IR_VERSION
    graphs = [model.graph, *(node_graph for node_graph in model.graphs())]
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            values.extend(node.outputs)
        for value in values:
            value.metadata_props.clear()
            value.doc_string = None
            if value.const_value is not None:
                value.const_value.metadata_props.clear()
                value.const_value.doc_string = None
