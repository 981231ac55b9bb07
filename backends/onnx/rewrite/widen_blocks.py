"""Weights in blocks that no kernel reads fast are widened by ONNX Runtime when it loads the model.

The file stays as small as the codes. Speed, and memory once it is loaded, are those of a float
layer; loading takes up to three times the float weights for a moment.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mopt.backends.onnx.translations.linear_nbits import WIDENED

ORDER = 5
_KERNEL = 4
# Two bits have no type in this opset: they are unpacked from bytes.
_TYPES = {4: (ir.DataType.INT4, ml_dtypes.int4), 8: (ir.DataType.INT8, np.int8)}


def rewrite(model: ir.Model) -> int:
    """Replace every MatMulNBits that is marked as widened by a MatMul with the widened codes."""
    marked: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "MatMulNBits" and node.attributes["accuracy_level"].as_int() == WIDENED:
            codes = node.inputs[1]
            assert codes is not None
            marked.setdefault(codes, []).append(node)
    for codes, nodes in marked.items():
        if len(nodes) < len(codes.uses()):
            # Another call reads the codes as they are: they are not stored a second time.
            for node in nodes:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _KERNEL)
            continue
        weight = _widened(model.graph, nodes[0])
        for node in nodes:
            _replace(model.graph, node, weight)
    return sum(map(len, marked.values()))


def _widened(graph: ir.Graph, first: ir.Node) -> ir.Value:
    """The float weight (K, N): codes in their order of use, so that nothing is transposed."""
    codes, scales = first.inputs[1], first.inputs[2]
    zero_points = first.inputs[3] if len(first.inputs) > 3 else None
    assert codes is not None and scales is not None
    bits, block = (first.attributes[name].as_int() for name in ("bits", "block_size"))
    columns, rows = (first.attributes[name].as_int() for name in ("K", "N"))
    middle = 2 ** (bits - 1)
    values = _in_order_of_use(_array(codes).reshape(rows, -1), bits).reshape(-1, block, rows)
    nodes, integers = _integers(graph, codes, values, bits)
    steps = _array(scales).reshape(rows, -1)
    if (steps == steps[:, :1]).all() and zero_points is None:
        steps = steps[:, :1]
    factor = _store(graph, codes, "scales", steps.T[:, None], scales.dtype)
    nodes.append(ir.node("Cast", [integers], {"to": scales.dtype}))
    if zero_points is not None:
        zeros = _unpacked(_array(zero_points).reshape(rows, -1), bits)[:, : steps.shape[1]]
        shift = (zeros.astype(np.int16) - middle).astype(steps.dtype).T[:, None]
        zero = _store(graph, codes, "zero_points", shift, scales.dtype)
        nodes.append(ir.node("Sub", [nodes[-1].outputs[0], zero]))
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], factor]))
    shape = _store(graph, codes, "shape", np.array([-1, rows], np.int64), ir.DataType.INT64)
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape]))
    if values.shape[0] * block != columns:
        ends = [
            _store(graph, codes, name, np.array([value], np.int64), ir.DataType.INT64)
            for name, value in (("start", 0), ("end", columns), ("axis", 0))
        ]
        nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *ends]))
    graph.insert_before(first, nodes)
    return nodes[-1].outputs[0]


def _integers(
    graph: ir.Graph, codes: ir.Value, values: np.ndarray, bits: int
) -> tuple[list[ir.Node], ir.Value]:
    """Nodes that give signed codes (blocks, block, N) back, and their result."""
    if bits in _TYPES:
        kind, dtype = _TYPES[bits]
        return [], _store(graph, codes, "codes", values.view(dtype), kind)
    blocks, block, rows = values.shape
    quarters = (values + 2).astype(np.uint8).reshape(blocks, block // 4, 4, rows)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed = np.bitwise_or.reduce(quarters << shifts, axis=2, keepdims=True)
    uint8, int64 = ir.DataType.UINT8, ir.DataType.INT64
    shape = _store(graph, codes, "unpacked", np.array(values.shape, np.int64), int64)
    stored, by, mask, middle = (
        _store(graph, codes, what, array, uint8)
        for what, array in (
            ("codes", packed), ("shifts", shifts), ("mask", np.array(3, np.uint8)),
            ("middle", np.array(2, np.uint8)),
        )
    )  # fmt: skip
    nodes = [ir.node("BitShift", [stored, by], {"direction": "RIGHT"})]
    nodes.append(ir.node("BitwiseAnd", [nodes[-1].outputs[0], mask]))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape]))
    signed = [ir.node("Cast", [value], {"to": ir.DataType.INT8})
              for value in (nodes[-1].outputs[0], middle)]  # fmt: skip
    difference = ir.node("Sub", [node.outputs[0] for node in signed])
    return [*nodes, *signed, difference], difference.outputs[0]


def _replace(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    product = ir.node("MatMul", [node.inputs[0], weight])
    nodes = [product]
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    if bias is not None:
        nodes.append(ir.node("Add", [product.outputs[0], bias]))
    old, new = node.outputs[0], nodes[-1].outputs[0]
    for value in {product.outputs[0], new}:
        value.type, value.shape = old.type, old.shape
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis, low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def _in_order_of_use(packed: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes (columns, rows), int8, of bytes (rows, bytes a row).

    Bytes are transposed, not codes: there are fewer of them.
    """
    by_column = np.ascontiguousarray(packed.T)
    codes = np.empty((len(by_column), 8 // bits, packed.shape[0]), np.uint8)
    for part in range(8 // bits):
        np.right_shift(by_column, np.uint8(part * bits), out=codes[:, part])
    codes &= np.uint8(2**bits - 1)
    codes -= np.uint8(2 ** (bits - 1))
    return codes.view(np.int8).reshape(-1, packed.shape[0])


def _store(
    graph: ir.Graph, like: ir.Value, what: str, array: np.ndarray, dtype: ir.DataType | None
) -> ir.Value:
    assert dtype is not None
    array = np.ascontiguousarray(array)
    name = f"{like.name}.{what}"
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype),
        const_value=ir.Tensor(array, dtype=dtype, name=name),
    )  # fmt: skip
    graph.register_initializer(value)
    return value
