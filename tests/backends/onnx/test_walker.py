"""Hostile ONNX models are refused before a runtime sees them; our own pass and still fold."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import AttributeProto, ModelProto, StringStringEntryProto, TensorProto, helper
from onnx import numpy_helper as nh

from mopt.backends.onnx.external import ExternalTensor, external_tensors
from mopt.backends.onnx.walker import CheckedModel
from mopt.backends.onnx.wire import scan_model
from mopt.errors import ArtifactError, LimitError, MoptError
from mopt.safe_read import Folder
from tests.backends.onnx.hostile import FLOAT, GOOD, attribute, check, edited, model, node, value


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


MASK = model(
    [
        node("Range", "a b c", "r"),
        node("Unsqueeze", "r axis", "u"),
        node("Concat", "u u", "d", axis=0),
        node("Shape", "d", "s"),
        node("Expand", "zero s"),
    ],
    {
        "a": np.array(0),
        "b": np.array(128),
        "c": np.array(1),
        "axis": np.array([1]),
        "zero": np.float32(0),
    },
)


def test_truncated_and_mutated_models_never_escape_as_other_errors(tmp_path: Path) -> None:
    good = MASK.SerializeToString()
    rng = random.Random(0)
    cases = [good[:n] for n in range(0, len(good), 3)]
    for _ in range(800):
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
    start = time.process_time()
    with pytest.raises(LimitError, match="more than 1000000 nodes"):
        check(tmp_path, raw)
    assert time.process_time() - start < 10


def test_checking_takes_no_longer_than_the_limit(tmp_path: Path) -> None:
    made = model(
        [node("Add", f"x{i} x{i}", f"x{i + 1}") for i in range(20_000)], inputs=[value("x0")]
    )
    assert check(tmp_path, made).nodes == 20_000
    with pytest.raises(LimitError, match="took over 0 s"):
        check(tmp_path, made, "parse-seconds=0")
