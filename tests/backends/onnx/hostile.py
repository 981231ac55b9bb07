"""Small ONNX models for tests of the checks, and the checks as one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper
from onnx import numpy_helper as nh

from mopt.backends.onnx.external import external_tensors
from mopt.backends.onnx.walker import CheckedModel, check_model
from mopt.backends.onnx.wire import scan_model
from mopt.limits import parse_limits
from mopt.safe_read import Folder

STANDARD = (
    "Add Cast Concat Constant ConstantOfShape Equal Expand Gather If MatMul Mul Range Relu Reshape "
    "Shape Slice Sub Tile Transpose Unsqueeze Where"
)
OPERATORS = frozenset(
    {("", name) for name in STANDARD.split()} | {("com.microsoft", "RotaryEmbedding")}
)
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def value(name: str, kind: int = FLOAT, shape: list[Any] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["batch", 4] if shape is None else shape)


def model(
    nodes: list[NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x")] if inputs is None else inputs,
        [value("y", shape=[])] if outputs is None else outputs,
        [nh.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def check(folder: Path, given: ModelProto | bytes, *limits: str) -> CheckedModel:
    raw = given if isinstance(given, bytes) else given.SerializeToString()
    (folder / "model.onnx").write_bytes(raw)
    with Folder(folder) as opened, opened.open_file("model.onnx") as file:
        bounds = parse_limits(limits)
        outline = scan_model(file, limits=bounds)
        external_tensors(outline, file, None, "model.onnx.data")
        return check_model(file, outline, operators=OPERATORS, limits=bounds)


GOOD = model([node("Add", "x w", "h"), node("Relu", "h")], {"w": np.ones(4, np.float32)})


def edited(edit: Callable[[ModelProto], object]) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(GOOD)
    edit(made)
    return made


def attribute(**fields: Any) -> ModelProto:
    made = AttributeProto(name="a", **fields)
    return edited(lambda m: m.graph.node[1].attribute.append(made))
