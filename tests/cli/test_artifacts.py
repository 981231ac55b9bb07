"""What is done with an artifact: run, verify, inspect."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mopt.frontend import capture
from mopt.json_files import json_bytes
from mopt.lowering import lower
from mopt.registry import find_backend
from mopt.safe_read import sha256_of
from tests.cli.command_line import NET, Call

QUICK = ("-b", "eager", "-r", "int8-weight", "--no-measure")


@pytest.fixture
def artifact(mopt: Call, net: str) -> str:
    done = mopt("compile", net, *QUICK)
    assert done.code == 0, done.err
    return "out/net"


def list_again(folder: str, name: str) -> None:
    """Enter a file in the manifest as it is now, as its author could."""
    path = Path(folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    file = Path(folder) / name
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    path.write_bytes(json_bytes(manifest))


# ---- run


def test_run_reads_and_writes_npz(mopt: Call, artifact: str) -> None:
    x = np.random.default_rng(0).normal(size=(3, 256))
    np.savez("x.npz", x=x)  # float64: what numpy makes when nobody asks
    done = mopt("run", artifact, "--input", "x.npz", "--output", "y.npz")
    assert done.code == 0, done.err
    assert "Wrote y.npz" in done.out
    outputs = np.load("y.npz")
    assert outputs["output_0"].shape == (3, 8)
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    exec(NET, space)
    with torch.no_grad():
        expected = space["factory"]()["model"](torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(outputs["output_0"], expected, atol=0.02)
    data = mopt("run", artifact, "--input", "x.npz", "--output", "y.npz", "--json").document
    assert data == {"output": "y.npz", "arrays": {"output_0": "float32[3, 8]"}}


@pytest.mark.parametrize(
    ("arrays", "code", "said"),
    [
        ({"x": np.zeros((3, 255), np.float32)}, "input-shape", "256"),
        ({"x": np.zeros((3, 256), np.int64)}, "input-dtype", "float32"),
        ({"x": np.zeros((3, 256)), "y": np.zeros(3)}, "input-names", "'y'"),
    ],
)
def test_run_says_which_input_is_wrong(
    mopt: Call, artifact: str, arrays: dict[str, np.ndarray], code: str, said: str
) -> None:
    np.savez("x.npz", **arrays)
    done = mopt("run", artifact, "--input", "x.npz", "--output", "y.npz")
    assert done.code == 2
    assert f"error[{code}]" in done.err
    assert said in done.err
    assert not Path("y.npz").exists()


def test_run_refuses_files_that_are_not_there_or_not_npz(mopt: Call, artifact: str) -> None:
    Path("x.npz").write_bytes(b"not a zip")
    for arguments in (
        ["--input", "absent.npz", "--output", "y.npz"],
        ["--input", "x.npz", "--output", "y.npz"],
        ["--input", "x.npz", "--output", "absent/y.npz"],
    ):
        done = mopt("run", artifact, *arguments)
        assert done.code == 2
        assert "Traceback" not in done.err
    assert mopt("run", "absent", "--input", "x.npz", "--output", "y.npz").code == 2
    assert not Path("y.npz").exists()


PARTLY = """
class Partly(Net):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(64))

    def forward(self, x):
        h = self.first(x)
        for _ in range(int(h.sum().abs()) % 2 + 1):
            h = torch.relu(h @ self.mix)
        return self.second(h)

def partly():
    torch.manual_seed(0)
    return {"model": Partly(), "example_inputs": batch(0)}
"""


def test_a_model_with_eager_parts_runs_with_its_module(mopt: Call, place: Path) -> None:
    Path("net.py").write_text(NET + PARTLY)
    assert mopt("compile", "net.py:partly", *QUICK).code == 0
    np.savez("x.npz", x=np.zeros((4, 256), np.float32))
    paths = ("--input", "x.npz", "--output", "y.npz")
    done = mopt("run", "out/partly", *paths)
    assert done.code == 2
    assert "error[needs-module]" in done.err
    assert "--model" in done.err
    done = mopt("run", "out/partly", *paths, "--model", "net.py:partly")
    assert done.code == 0, done.err
    assert np.load("y.npz")["output_0"].shape == (4, 8)
    done = mopt("verify", "out/partly", "--model", "net.py:partly")
    assert done.code == 0, done.err


# ---- verify


def test_verify_checks_hashes_and_says_what_it_did_not_check(mopt: Call, artifact: str) -> None:
    done = mopt("verify", artifact)
    assert done.code == 0, done.err
    assert "every hash matches" in done.out
    assert done.out.splitlines()[-1] == f"{artifact} is intact"
    assert "--model" in done.out
    assert len(mopt("verify", artifact, "-q").out.splitlines()) == 1


def test_verify_finds_one_flipped_bit(mopt: Call, artifact: str) -> None:
    weights = Path(artifact) / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = mopt("verify", artifact)
    assert done.code == 2
    assert done.out == ""
    assert "error[altered-artifact]: weights.safetensors" in done.err
    assert mopt("verify", artifact, "--json").document["error"]["code"] == "altered-artifact"


def test_verify_of_what_is_no_artifact(mopt: Call, place: Path) -> None:
    assert mopt("verify", "absent").code == 2
    Path("empty").mkdir()
    done = mopt("verify", "empty")
    assert done.code == 2
    assert "manifest.json" in done.err


def test_verify_runs_the_stored_sample(mopt: Call, artifact: str) -> None:
    done = mopt("verify", artifact, "--json")
    assert done.code == 0, done.err
    assert done.document["intact"] is True
    assert done.document["sample"]["cosine"] == pytest.approx(1.0)
    assert "same outputs as stored" in mopt("verify", artifact).out


def test_verify_finds_other_outputs_than_stored(mopt: Call, artifact: str) -> None:
    with np.load(Path(artifact) / "sample.npz") as stored:
        arrays = dict(stored)
    noise = np.random.default_rng(0).normal(size=arrays["output_0"].shape)
    arrays["output_0"] += noise.astype(np.float32)
    np.savez(Path(artifact) / "sample.npz", **arrays)
    list_again(artifact, "sample.npz")
    done = mopt("verify", artifact)
    assert done.code == 2
    assert "error[parity]" in done.err


def test_verify_compares_with_the_original_model(mopt: Call, artifact: str, net: str) -> None:
    done = mopt("verify", artifact, "--model", net)
    assert done.code == 0, done.err
    assert f"close to {net}" in done.out
    with Path("net.py").open("a") as file:
        file.write("\ndef other():\n    torch.manual_seed(5)\n"
                   "    return {'model': Net(), 'example_inputs': batch(0)}\n")  # fmt: skip
    shutil.copy("net.py", "other.py")
    done = mopt("verify", artifact, "--model", "other.py:other")
    assert done.code == 2
    assert "error[parity]" in done.err
    assert "same weights" in done.err


# ---- inspect


def test_inspect_a_model_lists_its_layers(mopt: Call, net: str) -> None:
    done = mopt("inspect", net)
    assert done.code == 0, done.err
    row = next(line for line in done.out.splitlines() if line.startswith("first"))
    assert row.split() == ["first", "linear", "64", "x", "256", "16.4", "k", "131", "k",
                           "65.5", "kB", "float32"]  # fmt: skip
    assert "2 layers, 17.0 k parameters" in done.out
    assert "net.py:" in mopt("inspect", net, "-v").out
    data = mopt("inspect", net, "--json").document
    assert [layer["path"] for layer in data["layers"]] == ["first", "second"]
    assert data["layers"][0]["flops"] == 2 * 4 * 64 * 256
    assert data["parameters"] == 64 * 256 + 64 + 8 * 64 + 8
    assert data["coverage"]["parameters"] == 1.0
    assert data["inputs"][0].startswith("x float32[")


def test_inspect_tells_what_stays_outside(mopt: Call, place: Path) -> None:
    Path("net.py").write_text(NET + PARTLY)
    done = mopt("inspect", "net.py:partly")
    assert done.code == 0, done.err
    assert "the rest runs in PyTorch as before" in done.out
    data = mopt("inspect", "net.py:partly", "--json").document
    assert data["coverage"]["flops"] < 1
    assert data["coverage"]["outside"][0]["source"]


def test_inspect_an_artifact_shows_before_and_after(mopt: Call, artifact: str) -> None:
    done = mopt("inspect", artifact)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "net: int8-weight, eager, for host"
    row = next(line for line in done.out.splitlines() if line.startswith("first"))
    assert "65.5 kB" in row
    assert "int8" in row
    data = mopt("inspect", artifact, "--json").document
    assert data["report"]["recipe"] == "int8-weight"
    assert (
        data["files"].keys()
        == json.loads((Path(artifact) / "manifest.json").read_text())["files"].keys()
    )


def test_an_artifact_without_a_report_can_still_be_inspected_and_verified(
    mopt: Call, place: Path
) -> None:
    program = capture(torch.nn.Linear(4, 2), (torch.zeros(3, 4),))
    lower(program, "eager").save("plain")
    done = mopt("inspect", "plain")
    assert done.code == 0, done.err
    assert "without a report" in done.out
    assert mopt("verify", "plain").code == 0


def _drop(*keys: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def _put(value: Any, *keys: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_put(99, "schema"), "report schema 99"),
        (_drop("quality"), "quality"),
        (_drop("layers", 0, "path"), "layers[0].path"),
        (_put("big", "result", "size_bytes"), "result.size_bytes"),
        (_put({"ratio": 0}, "speed"), "speed"),
        (_put([3], "steps"), "steps[0]"),
        (_put(None, "coverage", "outside"), "coverage.outside"),
    ],
)
def test_a_strangers_report_is_checked_before_it_is_shown(
    mopt: Call, artifact: str, change: Callable[[Any], None], said: str
) -> None:
    path = Path(artifact) / "report.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    done = mopt("inspect", artifact)
    assert done.code == 2
    assert said in done.err
    assert done.out == ""


def test_names_in_a_strangers_report_are_escaped(mopt: Call, artifact: str) -> None:
    path = Path(artifact) / "report.json"
    data = json.loads(path.read_text())
    data["layers"][0]["path"] = "\x1b]0;owned\x07"
    path.write_text(json.dumps(data))
    done = mopt("inspect", artifact)
    assert done.code == 0
    assert "\x1b" not in done.out
    assert "\\x1b]0;owned\\x07" in done.out


@pytest.mark.parametrize("verb", ["run", "verify"])
def test_a_model_that_ends_its_runtime_ends_a_child_only(
    mopt: Call, artifact: str, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The artifact is of another backend, which is quicker to make: what loads it is replaced.
    crash = [sys.executable, "-c", "import os; os.abort()"]
    monkeypatch.setattr("mopt.probing.find_backend", lambda name: find_backend("onnx"))
    monkeypatch.setattr("mopt.backends.onnx.session._child_command", lambda path: crash)
    np.savez("x.npz", x=np.zeros((4, 256), np.float32))
    more = ["--input", "x.npz", "--output", "y.npz"] if verb == "run" else []
    done = mopt(verb, artifact, *more)
    assert done.code == 2
    assert "error[child-crashed]" in done.err
    assert not Path("y.npz").exists()
