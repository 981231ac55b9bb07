"""Weights whose only use is transposed are stored transposed."""

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
        if not readers or not all(_is_transpose(node) for node in readers):
            continue
        permutations = {tuple(node.attributes["perm"].as_ints()) for node in readers}
        if len(permutations) != 1 or weight.is_graph_output():
            continue
        stored = _replaced(model.graph, weight, permutations.pop())
        for node in readers:
            node.outputs[0].replace_all_uses_with(stored)
            model.graph.remove(node, safe=True)
        changed += 1
    return changed


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
