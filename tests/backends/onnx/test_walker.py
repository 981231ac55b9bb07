"""Hostile ONNX models are refused before a runtime sees them; our own pass and still fold."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto, helper
from onnx import numpy_helper as nh

from mopt.backends.onnx.external import ExternalTensor, external_tensors
from mopt.backends.onnx.walker import CheckedModel, check_model
from mopt.backends.onnx.wire import scan_model
from mopt.errors import ArtifactError, LimitError, MoptError
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


def test_a_plain_model_passes(tmp_path: Path) -> None:
    assert check(tmp_path, GOOD) == CheckedModel(nodes=2, may_fold=True)


def test_only_the_outline_is_kept(tmp_path: Path) -> None:
    """The weights, nearly all bytes of a model, are neither copied nor parsed."""
    weights = {f"w{i}": np.full((256, 256), i, np.float32) for i in range(8)}
    weights["axes"] = np.array([0, 1])
    (tmp_path / "model.onnx").write_bytes(model([node("Relu", "x")], weights).SerializeToString())
    with Folder(tmp_path) as folder, folder.open_file("model.onnx") as file:
        outline = scan_model(file)
    assert len(outline.skeleton) < 1000 < 8 * 256 * 256 * 4 < file.size
    first = outline.initializers[0]
    assert (first.name, first.dims, first.nbytes) == ("w0", (256, 256), 256 * 256 * 4)
    parsed = ModelProto.FromString(outline.skeleton)
    assert len(parsed.graph.initializer) == 9
    assert nh.to_array(parsed.graph.initializer[8]).tolist() == [0, 1], "small values stay"
    assert not parsed.graph.initializer[0].raw_data


# --- what may not be in a model ---


def chained_functions() -> ModelProto:
    """3,000 functions, each calling the next, end ONNX Runtime with SIGSEGV."""
    functions = [
        helper.make_function(
            "f", f"F{i}", ["a"], ["b"],
            [helper.make_node(f"F{i + 1}" if i < 2999 else "Relu", ["a"], ["b"],
                              domain="f" if i < 2999 else "")],
            [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)],
        )
        for i in range(3000)
    ]  # fmt: skip
    made = model([helper.make_node("F0", ["x"], ["y"], domain="f")])
    made.functions.extend(functions)
    return made


def edited(edit: Callable[[ModelProto], object]) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(GOOD)
    edit(made)
    return made


def attribute(**fields: Any) -> ModelProto:
    made = AttributeProto(name="a", **fields)
    return edited(lambda m: m.graph.node[1].attribute.append(made))


def nested(depth: int) -> ModelProto:
    body = helper.make_graph([node("Relu", "x", "z0")], "b", [], [value("z0")])
    for i in range(1, depth):
        inner = node("If", "c", f"z{i}", then_branch=body, else_branch=body)
        body = helper.make_graph([inner], "b", [], [value(f"z{i}")])
    top = node("If", "c", then_branch=body, else_branch=body)
    return model([top], inputs=[value("x"), value("c", TensorProto.BOOL, [])])


def external(*entries: tuple[str, str]) -> ModelProto:
    def edit(made: ModelProto) -> None:
        tensor = made.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.extend(StringStringEntryProto(key=k, value=v) for k, v in entries)

    return edited(edit)


def attribute_tensor(**fields: Any) -> ModelProto:
    tensor = TensorProto(data_type=FLOAT, dims=[2], **fields)
    return attribute(type=AttributeProto.TENSOR, t=tensor)


FORBIDDEN: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "chained functions": (chained_functions, "functions of its own"),
    "training graph": (lambda: edited(lambda m: m.training_info.add()), "training graphs"),
    "unknown operator": (lambda: model([node("Loop", "x"), node("Scan", "x")]), "'Loop', 'Scan'"),
    "python operator": (
        lambda: model([helper.make_node("PyOp", ["x"], ["y"], domain="ai.onnx.contrib")]),
        "ai.onnx.contrib::PyOp"),
    "allowed name in another domain": (
        lambda: model([helper.make_node("Relu", ["x"], ["y"], domain="evil")]), "evil::Relu"),
    "unknown operator in a branch": (
        lambda: edited(lambda m: m.graph.node.append(node(
            "If", "x", "z", then_branch=helper.make_graph([node("Loop", "x")], "b", [], [])))),
        "'Loop'"),
    "another operator set": (
        lambda: edited(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))),
        "ai.onnx.ml"),
    "operator set twice": (
        lambda: edited(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 9))),
        "version 9"),
    "standard operator under its other name": (
        lambda: model([helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")]), "ai.onnx::Relu"),
    "name that is not text": (
        lambda: ModelProto.FromString(GOOD.SerializeToString().replace(b"Relu", b"Re\xffu")),
        "Re"),
    "overload": (lambda: edited(lambda m: setattr(m.graph.node[0], "overload", "v2")), "overload"),
    "attribute reference": (
        lambda: attribute(type=AttributeProto.INT, ref_attr_name="b"), "attribute 'a' of Relu"),
    "sparse attribute": (lambda: attribute(type=AttributeProto.SPARSE_TENSOR), "attribute 'a'"),
    "type attribute": (lambda: attribute(type=AttributeProto.TYPE_PROTO), "attribute 'a'"),
    "attribute of two kinds": (
        lambda: attribute(type=AttributeProto.INT, i=1, s=b"x"), "two kinds"),
    "attribute of no kind": (lambda: attribute(i=1), "attribute 'a'"),
    "external attribute": (
        lambda: attribute_tensor(
            data_location=TensorProto.EXTERNAL,
            external_data=[StringStringEntryProto(key="location", value="/etc/passwd")]),
        "another file"),
    "short attribute tensor": (lambda: attribute_tensor(raw_data=b"1234"), "4 bytes of a tensor"),
    "huge attribute tensor": (
        lambda: edited(lambda m: m.graph.node[1].attribute.append(AttributeProto(
            name="a", type=AttributeProto.TENSOR,
            t=TensorProto(data_type=FLOAT, dims=[1 << 30])))), "1073741824"),
    "string tensor": (
        lambda: edited(lambda m: setattr(m.graph.initializer[0], "data_type", 8)), "of type 8"),
    "sparse weights": (
        lambda: edited(lambda m: m.graph.sparse_initializer.add()), "sparse initializers"),
    "annotations": (
        lambda: edited(lambda m: m.graph.quantization_annotation.add()), "annotations"),
    "input that is a sequence": (
        lambda: edited(lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type
                       .__setattr__("elem_type", 1)), "not a tensor"),
    "input without a shape": (
        lambda: edited(lambda m: m.graph.input[0].type.tensor_type.ClearField("shape")),
        "how many sizes input 'x'"),
    "weight named twice": (
        lambda: edited(lambda m: m.graph.initializer.append(m.graph.initializer[0])), "'w' for 2"),
    "weight named like an input": (
        lambda: edited(lambda m: setattr(m.graph.initializer[0], "name", "x")), "'x' for 2"),
    "weight without a name": (
        lambda: edited(lambda m: m.graph.initializer[0].ClearField("name")), "the tensor ''"),
    "weight too short": (
        lambda: edited(lambda m: setattr(m.graph.initializer[0], "raw_data", b"12")), "needs 16"),
    "weight of negative size": (
        lambda: edited(lambda m: m.graph.initializer[0].dims.append(-1)), "impossible size"),
    "weight of overflowing size": (
        lambda: edited(lambda m: m.graph.initializer[0].dims.extend([1 << 33] * 2)),
        "impossible size"),
    "weight in segments": (
        lambda: edited(lambda m: m.graph.initializer[0].segment.__setattr__("begin", 0)),
        "tensor field 3"),
    "external weight outside": (lambda: external(("location", "../../etc/passwd")), "'../../etc"),
    "external weight, absolute": (lambda: external(("location", "/etc/passwd")), "'/etc/passwd'"),
    "external weight elsewhere": (lambda: external(("location", "other.bin")), "'other.bin'"),
    "external weight nowhere": (lambda: external(), "lies in None"),
    "external weight, unknown key": (
        lambda: external(("location", "model.onnx.data"), ("__class__", "x")), "'__class__'"),
    "external weight, key twice": (
        lambda: external(("location", "model.onnx.data"), ("location", "x")), "twice or unknown"),
    "external weight, no file": (
        lambda: external(("location", "model.onnx.data"), ("length", "16")), "which has 0"),
    "external weight, negative offset": (
        lambda: external(("location", "model.onnx.data"), ("offset", "-1"), ("length", "16")),
        "'-1'"),
    "external weight, no length": (lambda: external(("location", "model.onnx.data")), "length"),
    "external weight, wrong length": (
        lambda: external(("location", "model.onnx.data"), ("length", "8")), "needs 16"),
    "external and inside": (
        lambda: edited(lambda m: setattr(m.graph.initializer[0], "data_location", 1)), "twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORBIDDEN, ids=lambda c: c)
def test_forbidden_content_is_named(tmp_path: Path, case: str) -> None:
    make, words = FORBIDDEN[case]
    with pytest.raises(ArtifactError) as caught:
        check(tmp_path, make())
    assert caught.value.code in ("onnx-forbidden", "onnx-format", "onnx-external")
    assert words in caught.value.message and "model.onnx" in caught.value.message
    assert len(caught.value.message) < 400


# --- what would blow up ---


def doubling_ranks(count: int) -> ModelProto:
    """20 of these are 522 bytes and take ONNX Runtime 481 MB, optimizations off; 26 take 30 GB."""
    nodes = [node("Gather", f"x{i} x{i}", f"x{i + 1}") for i in range(count)]
    return model(nodes, inputs=[value("x0", INT)], outputs=[value(f"x{count}", INT, [])])


def doubling_shapes(count: int) -> ModelProto:
    nodes = [node("Shape", "x", "s0")]
    nodes += [node("Concat", f"s{i} s{i}", f"s{i + 1}", axis=0) for i in range(count)]
    return model([*nodes, node("ConstantOfShape", f"s{count}")])


def many_axes(count: int) -> ModelProto:
    nodes = [node("Unsqueeze", f"x{i} axes", f"x{i + 1}") for i in range(count)]
    return model(nodes, {"axes": np.arange(50)}, inputs=[value("x0")])


TOO_LARGE: dict[str, tuple[Callable[[], ModelProto], tuple[str, ...]]] = {
    "ranks double": (lambda: doubling_ranks(20), ()),
    "shapes double": (lambda: doubling_shapes(20), ()),
    "axes add up": (lambda: many_axes(500), ()),
    "shape of a million sizes": (
        lambda: model([node("Expand", "x s")], inputs=[value("x"), value("s", INT, [10**6])]), ()),
    "shape constant of 100 sizes": (
        lambda: model([node("Reshape", "x s")], {"s": np.ones(100, np.int64)}), ()),
    "input of 4 GiB": (lambda: model([], inputs=[value("x", shape=[1 << 15, 1 << 15])]), ()),
    "input whose size overflows": (lambda: model([], inputs=[value("x", shape=[1 << 40] * 3)]), ()),
    "value in between of 4 GiB": (
        lambda: edited(lambda m: m.graph.value_info.append(value("h", shape=[1 << 30]))), ()),
    "negative size": (lambda: model([], inputs=[value("x", shape=[-1])]), ()),
    "subgraphs in subgraphs": (lambda: nested(6), ()),
    "nodes": (lambda: model([node("Relu", "x")] * 11), ("onnx-nodes=10",)),
    "inputs": (lambda: model([], inputs=[value(f"x{i}") for i in range(9)]), ("onnx-ports=9",)),
    "attribute": (
        lambda: attribute(type=AttributeProto.INTS, ints=range(1000)), ("onnx-attribute=1000",)),
    "text attribute": (
        lambda: attribute(type=AttributeProto.STRING, s=b"x" * 2000), ("onnx-attribute=1000",)),
    "graph": (lambda: edited(lambda m: setattr(m.graph, "doc_string", "x" * 5000)),
              ("onnx-graph-bytes=4000",)),
    "around the graph": (lambda: edited(lambda m: setattr(m, "doc_string", "x" * 5000)),
                         ("onnx-graph-bytes=4000",)),
    "file": (lambda: GOOD, ("onnx-bytes=10",)),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_LARGE, ids=lambda c: c)
def test_what_would_blow_up_is_refused(tmp_path: Path, case: str) -> None:
    make, limits = TOO_LARGE[case]
    start = time.perf_counter()
    with pytest.raises(LimitError) as caught:
        check(tmp_path, make(), *limits)
    assert caught.value.code == "onnx-too-large"
    assert time.perf_counter() - start < 5


def test_what_is_within_the_limits_passes(tmp_path: Path) -> None:
    assert check(tmp_path, nested(4)).nodes == 1 + 2 + 4 + 8 + 16
    assert check(tmp_path, doubling_ranks(4)).nodes == 4
    assert check(tmp_path, doubling_shapes(3)).nodes == 5


def test_splitting_heads_in_every_layer_is_no_growth_of_ranks(tmp_path: Path) -> None:
    """The shapes that exported attention computes, 100 layers deep, with a dynamic batch."""
    nodes, at = [], "x"
    for i in range(100):
        nodes += [
            node("Shape", at, f"s{i}", start=0, end=2),
            node("Concat", f"s{i} heads", f"t{i}", axis=0),
            node("Reshape", f"{at} t{i}", f"h{i}"),
            node("Transpose", f"h{i}", f"p{i}", perm=[0, 2, 1, 3]),
            node("Shape", f"p{i}", f"u{i}"),
            node("Slice", f"u{i} zero one", f"v{i}"),
            node("Concat", f"v{i} flat", f"w{i}", axis=0),
            node("Reshape", f"p{i} w{i}", f"r{i}"),
        ]
        at = f"r{i}"
    weights = {
        "heads": np.array([2, 8]), "flat": np.array([-1, 16]),
        "zero": np.array([0]), "one": np.array([1]),
    }  # fmt: skip
    made = model(nodes, weights, inputs=[value("x", shape=["batch", "tokens", 16])])
    assert check(tmp_path, made).nodes == 800


# --- constant folding ---

BIG = np.array([100_000_000])
PICK = [value("x"), value("i", INT, ["n"])]
STATIC = [value("x", shape=[100_000_000]), value("i", INT, ["n"])]

BOMBS: dict[str, Callable[[], ModelProto]] = {
    "ConstantOfShape": lambda: model([node("ConstantOfShape", "s")], {"s": BIG}),
    "Expand": lambda: model([node("Expand", "c s")], {"s": BIG, "c": np.ones(1)}),
    "Tile": lambda: model([node("Tile", "c s")], {"s": BIG, "c": np.ones(1)}),
    "Range": lambda: model(
        [node("Range", "a b c")], {"a": np.array(0), "b": BIG[0], "c": np.array(1)}),
    "doubling": lambda: model(
        [node("Concat", f"c{i} c{i}", f"c{i + 1}", axis=0) for i in range(25)],
        {"c0": np.ones(12)}),
    "outer product": lambda: model(
        [node("MatMul", "a b")], {"a": np.ones((20_000, 1)), "b": np.ones((1, 20_000))}),
    "broadcast": lambda: model(
        [node("Add", "a b")], {"a": np.ones((20_000, 1)), "b": np.ones((1, 20_000))}),
    "gathered": lambda: model(
        [node("Gather", "a i")], {"a": np.ones((1, 20_000)), "i": np.zeros(20_000, np.int64)}),
    "shape of a fixed input": lambda: model(
        [node("Relu", "x", "r"), node("Shape", "r", "s"), node("ConstantOfShape", "s")],
        inputs=STATIC),
    "shape computed from a fixed input": lambda: model(
        [node("Shape", "x", "s"), node("Mul", "s s", "t"), node("ConstantOfShape", "t")],
        inputs=STATIC),
    "shape behind an operator nobody knows": lambda: model(
        [helper.make_node("RotaryEmbedding", ["x"], ["r"], domain="com.microsoft"),
         node("Shape", "r", "s"), node("ConstantOfShape", "s")], inputs=STATIC),
    "number that grows for ever": lambda: model(
        [node("Mul", f"c{i} c{i}", f"c{i + 1}") for i in range(200)]
        + [node("ConstantOfShape", "c200")], {"c0": np.array([3])}),
    "a lie about a shape": lambda: edited_shape(),
    "in a branch, behind a lie about what it gets": lambda: model(
        [node("If", "c", then_branch=helper.make_graph(
            [node("Shape", "q", "s"), node("ConstantOfShape", "s", "z")], "b",
            [value("q", shape=["n"])], [value("z", shape=[])]),
            else_branch=helper.make_graph([node("Relu", "x", "z")], "b", [], [value("z")]))],
        inputs=[value("c", TensorProto.BOOL, [])]),
    "in a branch": lambda: model(
        [node("If", "c", then_branch=helper.make_graph(
            [node("ConstantOfShape", "s", "z")], "b", [], [value("z", shape=[])]),
            else_branch=helper.make_graph([node("Relu", "x", "z")], "b", [], [value("z")]))],
        {"s": BIG}, inputs=[value("x"), value("c", TensorProto.BOOL, [])]),
}  # fmt: skip


def edited_shape() -> ModelProto:
    made = model(
        [node("Relu", "x", "r"), node("Shape", "r", "s"), node("ConstantOfShape", "s")],
        inputs=STATIC,
    )
    made.graph.value_info.append(value("r", shape=["n"]))
    return made


@pytest.mark.parametrize("case", BOMBS, ids=lambda c: c)
def test_a_bomb_is_loaded_without_folding(tmp_path: Path, case: str) -> None:
    assert not check(tmp_path, BOMBS[case]()).may_fold


FOLDABLE: dict[str, Callable[[], ModelProto]] = {
    "weights laid out": lambda: model(
        [node("Transpose", "w", "t", perm=[1, 0]), node("Slice", "t a b", "u"),
         node("Concat", "u u", "v", axis=0), node("Cast", "v", "f", to=1), node("MatMul", "x f")],
        {"w": np.ones((64, 4), np.float16), "a": np.array([0]), "b": np.array([2])}),
    "zeros for a batch that varies": lambda: model(
        [node("Shape", "x", "s", start=0, end=1), node("Concat", "two s n", "t", axis=0),
         node("Expand", "zero t")],
        {"two": np.array([2]), "n": np.array([256]), "zero": np.float32(0)}),
    "zeros behind a contributed operator": lambda: model(
        [helper.make_node("RotaryEmbedding", ["x"], ["r"], domain="com.microsoft"),
         node("Shape", "r", "s"), node("Expand", "zero s")], {"zero": np.float32(0)}),
    "heads split and joined for a batch that varies": lambda: model(
        [node("Shape", "x", "s", start=0, end=2), node("Concat", "s heads", "t", axis=0),
         node("Reshape", "x t", "h"), node("Transpose", "h", "p", perm=[0, 2, 1, 3]),
         node("Reshape", "p back", "r"), node("Add", "x r", "a"),
         node("Shape", "a", "u"), node("Expand", "zero u")],
        {"heads": np.array([2, 8]), "back": np.array([0, -1, 16]), "zero": np.float32(0)},
        inputs=[value("x", shape=["batch", "tokens", 16])]),
    "a mask of known size": lambda: model(
        [node("Range", "a b c", "r"), node("Unsqueeze", "r axis", "u"), node("Sub", "r u", "d"),
         node("Shape", "d", "s"), node("Equal", "s minus", "e"), node("Where", "e ones s", "t"),
         node("Expand", "d t")],
        {"a": np.array(0), "b": np.array(128), "c": np.array(1), "axis": np.array([1]),
         "minus": np.array([-1, -1]), "ones": np.array([1, 1])}),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDABLE, ids=lambda c: c)
def test_what_exporters_write_may_fold(tmp_path: Path, case: str) -> None:
    assert check(tmp_path, FOLDABLE[case]()).may_fold


# --- external weights ---


def placed(folder: Path, tensors: list[tuple[int, int]], size: int) -> list[ExternalTensor]:
    """Tensors of given offset and length in a data file of that size."""
    made = model([node("Relu", "x")])
    for i, (offset, length) in enumerate(tensors):
        tensor = made.graph.initializer.add(name=f"w{i}", data_type=2, dims=[length])
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", "d"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(text))
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    (folder / "d").write_bytes(bytes(size))
    with (
        Folder(folder) as opened,
        opened.open_file("model.onnx") as file,
        opened.open_file("d") as data,
    ):
        return list(external_tensors(scan_model(file), file, data, "d"))


def test_external_weights_lie_side_by_side_within_the_file(tmp_path: Path) -> None:
    found = placed(tmp_path, [(64, 10), (0, 64), (74, 0)], 80)
    assert [(t.name, t.offset, t.nbytes) for t in found] == [
        ("w1", 0, 64), ("w0", 64, 10), ("w2", 74, 0)
    ]  # fmt: skip
    for tensors, size in [
        ([(0, 81)], 80),
        ([(10**18, 1)], 80),
        ([(0, 50), (49, 10)], 80),
        ([(0, 50)] * 2, 80),
    ]:
        with pytest.raises(ArtifactError) as caught:
            placed(tmp_path, tensors, size)
        assert caught.value.code == "onnx-external"


# --- broken bytes ---


def field(number: int, kind: int, content: bytes = b"") -> bytes:
    head = (
        bytes([number << 3 | kind])
        if number < 16
        else bytes([number << 3 & 127 | 128, number >> 4])
    )
    return head + (bytes([len(content)]) + content if kind == 2 else content)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x07",
        field(7, 2, b"")[:1],
        field(7, 2) + field(7, 2),
        field(1, 0, b"\x0a"),
        field(7, 0, b"\x01"),
        field(7, 2, field(1, 3)),
        field(7, 2, field(5, 2, field(14, 0, b"\x07"))),
        field(9, 2, b"?"),
        field(7, 2, field(3, 2, b"?")),
        field(1, 0, b"\xff" * 10),
        b"\x3a\xff\xff\xff\xff\x7f",
        b"\x80" * 100,
        b"\x00\x00",
        field(7, 2, field(1, 2, b"\xff" * 20)),
    ],
    ids=lambda r: r.hex()[:24],
)
def test_broken_bytes_are_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(ArtifactError) as caught:
        check(tmp_path, raw)
    assert caught.value.code == "onnx-format"


def test_truncated_and_mutated_models_never_escape_as_other_errors(tmp_path: Path) -> None:
    good = FOLDABLE["a mask of known size"]().SerializeToString()
    rng = random.Random(0)
    cases = [good[:n] for n in range(0, len(good), 3)]
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        cases.append(bytes(data))
    refused = 0
    for raw in cases:
        try:
            check(tmp_path, raw)
        except MoptError:
            refused += 1
    assert refused > len(cases) // 2


def test_floods_of_small_fields_stay_cheap(tmp_path: Path) -> None:
    """32 million empty nodes fit into 64 MiB; they are counted, not parsed."""
    body = b"\x0a\x00" * 1_100_000
    raw = b"\x3a" + bytes([len(body) & 127 | 128, len(body) >> 7 & 127 | 128,
                           len(body) >> 14 & 127 | 128, len(body) >> 21]) + body  # fmt: skip
    start = time.perf_counter()
    with pytest.raises(LimitError, match="more than 1000000 nodes"):
        check(tmp_path, raw)
    assert time.perf_counter() - start < 10
