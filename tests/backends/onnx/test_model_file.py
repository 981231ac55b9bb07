"""Files written one weight after another hold what protobuf writes at once."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from mopt.backends.onnx.model_file import write_model

LARGE = (1 << 16) + 1


def make_model(weights: dict[str, ir.TensorProtocol]) -> ir.Model:
    """A model whose only node reads all of ``weights``."""
    values = []
    for name, tensor in weights.items():
        value = ir.Value(name=name, const_value=tensor)
        value.type, value.shape = ir.TensorType(tensor.dtype), tensor.shape
        values.append(value)
    node = ir.node("Use", values, domain="test")
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, name="g",
                     opset_imports={"": 20, "test": 1})  # fmt: skip
    return ir.Model(graph, ir_version=10, producer_name="mopt")


def kinds() -> dict[str, ir.TensorProtocol]:
    """Large and small tensors, whole bytes and halves of bytes."""
    rng = np.random.default_rng(0)
    return {
        "floats": ir.tensor(rng.normal(size=(LARGE,)).astype(np.float32)),
        "brains": ir.tensor(rng.normal(size=(3, LARGE)).astype(ml_dtypes.bfloat16)),
        "codes": ir.tensor(rng.integers(-8, 8, size=(2 * LARGE + 1,)).astype(ml_dtypes.int4)),
        "shape": ir.tensor(np.array([1, -1], np.int64)),
        "none": ir.tensor(np.zeros((0, 4), np.float32)),
        "text": ir.StringTensor([b"a", b"b"], shape=ir.Shape([2])),
        "proto": ir.serde.TensorProtoTensor(
            onnx.numpy_helper.from_array(rng.integers(0, 9, size=(LARGE,)), "proto")
        ),
    }


def test_the_file_is_the_message_protobuf_makes(tmp_path: Path) -> None:
    expected = ir.to_proto(make_model(kinds()))
    write_model(make_model(kinds()), tmp_path / "model.onnx")
    found = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(found)
    assert found.graph.initializer == expected.graph.initializer
    for proto in (found, expected):
        del proto.graph.initializer[:]
        del proto.graph.value_info[:]  # the types of initializers, which they say themselves
    assert found == expected


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in "ab":
        write_model(make_model(kinds()), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_do_not_lie_in_memory_together(tmp_path: Path) -> None:
    data = np.zeros(1 << 18, np.float32)
    model = make_model({f"w{i}": ir.tensor(data, name=f"w{i}") for i in range(16)})
    tracemalloc.start()
    write_model(model, tmp_path / "model.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "model.onnx").stat().st_size > 16 * data.nbytes
    assert peak < 2 * data.nbytes
