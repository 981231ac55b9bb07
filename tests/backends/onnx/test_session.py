"""Sessions run checked files without torch, say what is wrong with inputs, and can be timed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mopt.backends.onnx.session import bench_command, check_file, open_session, probe_file
from mopt.errors import ArtifactError, InputError, LimitError, MoptError, UsageError
from mopt.limits import parse_limits
from mopt.measure import Subject, compare, measure_one
from mopt.npz_files import write_npz
from mopt.safe_read import sha256_of


def chain(width: int, layers: int) -> onnx.ModelProto:
    """``layers`` matrix products with an input ``x`` [batch, width] and a mask of its batch."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(
            rng.standard_normal((width, width)).astype(np.float32) / width**0.5, f"w{i}"
        )
        for i in range(layers)
    ]
    names = ["x", *(f"h{i}" for i in range(1, layers)), "y0"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)]
    nodes.append(helper.make_node("Where", ["mask", "y0", "zero"], ["y"]))
    weights.append(numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    graph = helper.make_graph(
        nodes,
        "chain",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width]),
            helper.make_tensor_value_info("mask", TensorProto.BOOL, ["batch", 1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def save(folder: Path, width: int = 16, layers: int = 2, external: bool = False) -> Path:
    folder.mkdir()
    model = chain(width, layers)
    if external:
        onnx.save(
            model,
            folder / "model.onnx",
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=16,
        )
    else:
        onnx.save(model, folder / "model.onnx")
    return folder


X = np.arange(48, dtype=np.float32).reshape(3, 16)
MASK = np.array([[True], [False], [True]])


def _handles() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{fd}").exists()]  # noqa: PTH208


def expected(width: int = 16, layers: int = 2) -> np.ndarray:
    value = X
    for tensor in chain(width, layers).graph.initializer[:layers]:
        value = value @ numpy_helper.to_array(tensor)
    return np.where(MASK, value, 0)


@pytest.mark.parametrize("external", [False, True])
def test_runs_from_a_folder_and_from_a_file(tmp_path: Path, external: bool) -> None:
    folder = save(tmp_path / "m", external=external)
    assert (folder / "model.onnx.data").exists() == external
    for path in (folder, folder / "model.onnx", str(folder)):
        with open_session(path, threads=1) as session:
            (y,) = session.run([X, MASK])
        np.testing.assert_allclose(y, expected(), rtol=1e-4, atol=1e-4)
    assert [str(port) for port in session.inputs] == ["float32[batch, 16]", "bool[batch, 1]"]
    assert [port.name for port in session.outputs] == ["y"]


def test_needs_no_torch_and_no_onnx() -> None:
    code = (
        "import sys, mopt.backends.onnx.session; "
        "sys.exit(bool({'torch', 'onnx', 'onnxscript', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_loaded_weights_survive_their_names(tmp_path: Path) -> None:
    """The handles are used, not the names: nobody can swap the files under a loaded model."""
    folder = save(tmp_path / "m", external=True)
    session = open_session(folder, threads=1)
    shutil.rmtree(folder)
    np.testing.assert_allclose(session.run([X, MASK])[0], expected(), rtol=1e-4, atol=1e-4)
    session.close()
    handles = [os.readlink(f"/proc/self/fd/{fd}") for fd in _handles()]  # noqa: PTH115
    assert not any("model.onnx" in handle for handle in handles)


@pytest.mark.parametrize(
    ("inputs", "code", "words"),
    [
        ([X], "input-count", "expected 2 inputs, found 1"),
        ([X.astype(np.float64), MASK], "input-dtype", "'x': expected float32[batch, 16], found fl"),
        ([X[:, :5], MASK], "input-shape", "expected float32[batch, 16], found float32[3, 5]"),
        ([X[0], MASK], "input-shape", "found float32[16]"),
        ([X, MASK[:2]], "input-shape", "'mask': 'batch' is 2, but 3 in input 'x'"),
    ],
)
def test_wrong_inputs_are_named(
    tmp_path: Path, inputs: list[np.ndarray], code: str, words: str
) -> None:
    with open_session(save(tmp_path / "m"), threads=1) as session:
        with pytest.raises(InputError) as caught:
            session.run(inputs)
        assert caught.value.code == code and words in str(caught.value)
        assert session.run([X, MASK]), "it still works"


def test_inputs_of_any_layout(tmp_path: Path) -> None:
    with open_session(save(tmp_path / "m"), threads=1) as session:
        (y,) = session.run([np.asfortranarray(X), np.repeat(MASK, 2, axis=1)[:, ::2]])
        assert session.run([X[:0], MASK[:0]])[0].shape == (0, 16)
    np.testing.assert_allclose(y, expected(), rtol=1e-4, atol=1e-4)


def test_values_the_model_cannot_take(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.ones((3, 2), np.float32), "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "lookup.onnx")
    with open_session(tmp_path / "lookup.onnx") as session:
        with pytest.raises(InputError) as caught:
            session.run([np.array([7])])
        assert caught.value.code == "onnx-run-failed" and "idx=7" in caught.value.message


def test_closing(tmp_path: Path) -> None:
    session = open_session(save(tmp_path / "m"))
    session.close()
    session.close()
    with pytest.raises(UsageError) as caught:
        session.run([X, MASK])
    assert caught.value.code == "runner-closed"


def test_hashes_are_of_what_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", external=True)
    hashes = {name: sha256_of(folder / name) for name in ("model.onnx", "model.onnx.data")}
    open_session(folder, sha256=hashes).close()
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(ArtifactError) as caught:
        open_session(folder, sha256=hashes)
    assert caught.value.code == "altered-artifact" and "model.onnx.data" in caught.value.message


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    with pytest.raises(ArtifactError) as caught:
        open_session(folder / "other.onnx")
    assert caught.value.code == "file-not-found"
    with pytest.raises(LimitError):
        open_session(folder, limits=parse_limits(["onnx-bytes=100"]))
    with pytest.raises(UsageError):
        open_session(folder, threads=-1)
    model = chain(16, 1)
    model.opset_import[0].version = 9999
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(ArtifactError) as caught:
        open_session(folder)
    assert caught.value.code == "onnx-load-failed"
    model = chain(16, 1)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    del model.graph.node[:]
    model.graph.output[0].name = "x"
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(MoptError):
        open_session(folder)


def test_strangers_models_are_checked_before_they_are_loaded(tmp_path: Path) -> None:
    model = chain(16, 1)
    model.graph.node[0].domain = "evil"
    model.opset_import.append(helper.make_opsetid("evil", 1))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError) as caught:
        open_session(tmp_path)
    assert caught.value.code == "onnx-forbidden"
    with pytest.raises(ArtifactError):
        bench_command(tmp_path, tmp_path / "in.npz", threads=1)


def load_in_child(folder: Path, max_memory: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "mopt.backends.onnx.session", "--bench", str(folder)]
    return subprocess.run(
        [*command, "--max-memory", str(max_memory)], capture_output=True, text=True
    )


def test_a_bomb_does_not_go_off(tmp_path: Path) -> None:
    """77 bytes that make ONNX Runtime fold a constant of 4 GB while it loads."""
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["s"], ["y"])],
        "bomb",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.array([1_000_000_000]), "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    done = load_in_child(tmp_path, 1 << 29)
    assert done.returncode == 0, done.stderr
    with pytest.raises(LimitError):
        open_session(tmp_path, limits=parse_limits(["onnx-nodes=0"]))
    checked = check_file(tmp_path)
    assert not checked.may_fold
    command = bench_command(tmp_path, tmp_path / "in.npz", threads=1)
    assert "--no-folding" in command and "--unchecked" in command


def test_probing_bounds_what_loading_may_take(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", 256, 4)
    probe_file(folder, max_memory=1 << 32)
    with pytest.raises(MoptError) as caught:
        probe_file(folder, max_memory=1 << 24)
    assert caught.value.code in ("child-failed", "child-crashed")
    assert "loading" in caught.value.message
    with pytest.raises(LimitError) as limited:
        probe_file(folder, limits=parse_limits(["load-seconds=0"]))
    assert limited.value.code == "child-timeout"


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN])
def test_external_weights_of_types_numpy_lacks(tmp_path: Path, kind: int) -> None:
    """The same numbers inside and outside the file: packed, and not at an even place."""
    numbers = np.array([[1.0, -2.0, 3.0], [4.0, -5.0, 6.0], [7.0, 0.0, 1.0]], np.float32)
    weight = helper.make_tensor("w", kind, [3, 3], numbers.reshape(-1))
    weight = numpy_helper.from_array(numpy_helper.to_array(weight), "w")
    first = numpy_helper.from_array(np.array([9], np.int8), "nine")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["x", "f"], ["m"]),
            helper.make_node("Cast", ["nine"], ["n"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["m", "n"], ["y"]),
        ],
        "typed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [first, weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    blob = b""
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        for key, text in (
            ("location", "model.onnx.data"),
            ("offset", str(len(blob))),
            ("length", str(len(raw))),
        ):
            tensor.external_data.add(key=key, value=text)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        blob += raw
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes(blob)
    x = np.eye(3, dtype=np.float32)
    with open_session(tmp_path) as session:
        np.testing.assert_array_equal(session.run([x])[0], numbers + 9)


def test_two_models_timed_in_fresh_processes(tmp_path: Path) -> None:
    """Sixteen layers of width 512 against two: the child, the pairs and the memory are real."""
    inputs = tmp_path / "inputs.npz"
    write_npz(inputs, {"mask": np.ones((4, 1), bool), "x": np.ones((4, 512), np.float32)})
    small, large = (
        Subject(
            bench_command(save(tmp_path / str(n), 512, n, external=True), inputs, threads=1),
            f"{n} layers",
        )
        for n in (2, 16)
    )
    found = compare(small, large, max_pairs=3, quick=True, max_seconds=12)
    assert found.ratio > 2
    weights = 14 * 512 * 512 * 4
    assert 0.8 * weights < found.candidate.peak_bytes - found.reference.peak_bytes < 3 * weights
    assert found.reference.median_ms > 0 and found.reference.load_ms > 0


def test_errors_of_the_timing_child_reach_the_user(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.npz"
    write_npz(inputs, {"q": X})
    subject = Subject(bench_command(save(tmp_path / "m"), inputs, threads=1), "mine")
    with pytest.raises(ArtifactError) as caught:
        measure_one(subject, samples=1)
    assert caught.value.code == "child-failed"
    assert "error[input-names]" in caught.value.message and "['mask', 'x']" in caught.value.message


def test_the_child_only_loads_when_no_inputs_are_given(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    command = [sys.executable, "-P", "-m", "mopt.backends.onnx.session", "--bench", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)) == (0, {})
    (folder / "model.onnx").write_bytes(b"\x07")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "error[onnx-format]" in done.stderr


def test_the_child_ignores_the_folder_it_is_started_in(tmp_path: Path) -> None:
    """A user's own random.py or onnx.py must not become part of the measurement."""
    (tmp_path / "numpy.py").write_text("raise SystemExit(99)")
    write_npz(tmp_path / "in.npz", {"x": X, "mask": MASK})
    command = bench_command(save(tmp_path / "m"), tmp_path / "in.npz", threads=1)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["calls"] >= 5
