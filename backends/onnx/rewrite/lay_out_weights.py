"""Weights that are only read transposed, or widened and transposed, are stored transposed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

ORDER = 10


def rewrite(model: ir.Model) -> int:
    """Compute each Transpose of a stored weight that nothing else reads.

    A weight with another reader (an embedding tied to the output layer) keeps its Transpose, which
    ONNX Runtime computes when it loads the model: the file holds the weight once.
    """
    changed = 0
    for weight in list(model.graph.initializers.values()):
        readers = [use.node for use in weight.uses()]
        # Codes are widened first: what is transposed are the results.
        widened = [node for node in readers if _is_dequantize(node, weight)]
        turned = [use.node for node in widened for use in node.outputs[0].uses()] or readers
        if (widened and len(widened) < len(readers)) or weight.is_graph_output():
            continue
        permutation = _permutation(turned)
        if permutation is None:
            continue
        stored = _replaced(model.graph, weight, permutation)
        for node in widened:
            axis = node.attributes["axis"].as_int()
            node.attributes["axis"] = ir.AttrInt64("axis", permutation.index(axis))
            node.replace_input_with(0, stored)
            node.outputs[0].shape = stored.shape
        for node in turned:
            source = node.inputs[0] if widened else stored
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
        changed += 1
    return changed


def _permutation(nodes: list[ir.Node]) -> tuple[int, ...] | None:
    """The order that all of them bring the axes into; None if they are not alike, or none."""
    if not nodes or not all(_is_transpose(node) for node in nodes):
        return None
    found = {tuple(node.attributes["perm"].as_ints()) for node in nodes}
    return found.pop() if len(found) == 1 else None


def _is_dequantize(node: ir.Node, weight: ir.Value) -> bool:
    """Whether a node widens these codes with a scale per index of one axis."""
    if node.op_type != "DequantizeLinear" or node.domain or node.inputs[0] is not weight:
        return False
    scale = node.inputs[1]
    per_axis = scale is not None and scale.shape is not None and len(scale.shape) == 1
    return per_axis and "axis" in node.attributes and not node.outputs[0].is_graph_output()


def _is_transpose(node: ir.Node) -> bool:
    return (
        node.op_type == "Transpose" and node.domain == "" and not node.outputs[0].is_graph_output()
    )


def _replaced(graph: ir.Graph, weight: ir.Value, permutation: tuple[int, ...]) -> ir.Value:
    tensor = weight.const_value
    assert tensor is not None
    array = np.ascontiguousarray(np.transpose(tensor.numpy(), permutation))
    name = str(weight.name)
    graph.initializers.pop(name)
    stored = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=ir.Tensor(array, dtype=tensor.dtype, name=name),
    )
    graph.register_initializer(stored)
    return stored
