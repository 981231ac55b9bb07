"""Models that would take the memory or the time of whoever loads them; and those that do not."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper

from mopt.errors import LimitError, MoptError
from tests.backends.onnx.hostile import (
    GOOD,
    INT,
    STANDARD,
    attribute,
    check,
    edited,
    model,
    node,
    value,
)


def nested(depth: int) -> ModelProto:
    body = helper.make_graph([node("Relu", "x", "z0")], "b", [], [value("z0")])
    for i in range(1, depth):
        inner = node("If", "c", f"z{i}", then_branch=body, else_branch=body)
        body = helper.make_graph([inner], "b", [], [value(f"z{i}")])
    top = node("If", "c", then_branch=body, else_branch=body)
    return model([top], inputs=[value("x"), value("c", TensorProto.BOOL, [])])


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
    start = time.process_time()
    with pytest.raises(LimitError) as caught:
        check(tmp_path, make(), *limits)
    assert caught.value.code == "onnx-too-large"
    assert time.process_time() - start < 5


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
    "positions cut to a length that varies": lambda: model(
        [node("Shape", "x", "n", start=1, end=2), node("Slice", "table zero n one", "p"),
         node("Add", "x p", "a"), node("Shape", "a", "u"), node("Expand", "fill u")],
        {"table": np.ones((1, 64, 16)), "zero": np.array([0]), "one": np.array([1]),
         "fill": np.float32(0)},
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


def changed(given: ModelProto, rng: random.Random) -> ModelProto:
    """The model with a few inputs, operators, attributes, sizes or contents exchanged."""
    made = ModelProto()
    made.CopyFrom(given)
    graph = made.graph
    names = [name for n in graph.node for name in n.output]
    names += [tensor.name for tensor in graph.initializer] + [v.name for v in graph.input]
    numbers = [-(2**62), -5, -1, 0, 1, 2, 7, 100, 10**6, 2**31, 2**62]
    for _ in range(rng.randrange(1, 4)):
        target = rng.choice(graph.node)
        kind = rng.randrange(7)
        if kind == 0 and target.input:
            target.input[rng.randrange(len(target.input))] = rng.choice([*names, ""])
        elif kind == 1:
            target.op_type = rng.choice(STANDARD.split())
        elif kind == 2 and target.attribute:
            attribute = rng.choice(target.attribute)
            if attribute.ints:
                attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(numbers)
            elif attribute.HasField("i"):
                attribute.i = rng.choice(numbers)
        elif kind == 3 and target.attribute:
            del target.attribute[rng.randrange(len(target.attribute))]
        elif kind == 4 and graph.initializer:
            tensor = rng.choice(graph.initializer)
            if tensor.data_type == INT and tensor.raw_data:
                values = np.frombuffer(tensor.raw_data, np.int64).copy()
                values[rng.randrange(len(values))] = rng.choice(numbers)
                tensor.raw_data = values.tobytes()
        elif kind == 5:
            target.input.append(rng.choice(names))
        elif kind == 6 and target.input:
            del target.input[rng.randrange(len(target.input))]
    return made


def test_changed_models_never_escape_as_other_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    bases = [make() for make in [*BOMBS.values(), *FOLDABLE.values()] if make().ByteSize() < 10_000]
    passed = 0
    for _ in range(1200):
        with suppress(MoptError):
            check(tmp_path, changed(rng.choice(bases), rng))
            passed += 1
    assert passed > 200
