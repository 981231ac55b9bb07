"""Lowering for a GPU on a machine without one, and running what comes out on the CPU."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mopt
from mopt.backends.triton import architectures
from mopt.backends.triton.cuda_driver import StoredRunner
from mopt.backends.triton.interpreter import run_interpreted
from mopt.backends.triton.kernel import problem
from mopt.backends.triton.kernel_file import read_binary, read_kernels
from mopt.backends.triton.launch import tile
from mopt.backends.triton.layers import table_key
from mopt.backends.triton.lower import BACKEND
from mopt.backends.triton.lowerings.linear_codes import LINEAR_CODES, CodesLinear
from mopt.backends.triton.rewrite import find_sites, replace
from mopt.backends.triton.runtime import FallbackTiles
from mopt.errors import ArtifactError, LoweringError, UsageError
from mopt.lowering import lower
from mopt.program import Program
from mopt.recipe import Recipe
from mopt.safe_read import Folder


class Feed(nn.Module):
    """A gated feed-forward block behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def compressed(recipe: str) -> Program:
    """The block after a recipe."""
    program = mopt.capture(Feed().eval(), (torch.randn(2, 5, 64),))
    return mopt.Pipeline(Recipe.load(recipe).passes()).run(program)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with int4 weights for an H200."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # Two sizes of calls instead of six: a third of the binaries.
        patch.setattr(CodesLinear, "buckets", (16, 256))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        artifact = lower(compressed("int4-weight"), "triton", target="h200")
    return artifact.save(tmp_path_factory.mktemp("triton") / "model")


def kernels_of(folder: Path) -> dict:
    return json.loads((folder / "kernels.json").read_text())


def test_kernels_run_interpreted_as_the_program_does(folder: Path) -> None:
    x = torch.randn(2, 5, 64)
    with mopt.load(folder) as reference, mopt.load(folder, device="interpreter") as kernels:
        wanted, found = reference(x), kernels(x)
    assert not torch.equal(wanted, found)  # another order of additions
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-weight", "nf4", "fp8-weight"])
def test_other_recipes_run_interpreted_as_they_mean(recipe: str) -> None:
    program = compressed(recipe)
    x = torch.randn(2, 5, 64)
    module = program.copy().graph_module
    sites, left = find_sites(module)
    layers = replace(module, sites)
    assert sum("linear" in layer.kernel.name for layer in layers) == 3 and not left
    for layer in layers:
        layer.bind(run_interpreted, FallbackTiles({}), always=True)
    with torch.no_grad():
        found, wanted = module(x), program.run(x)
    # One rounding of an 8-bit input may flip: a 255th of its range times a weight.
    limit = 2e-2 if recipe == "int8-dynamic" else 5e-6
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit * float(wanted.abs().max()))


def test_binaries_for_every_generation_say_what_they_take(folder: Path) -> None:
    data = kernels_of(folder)
    assert data["target"] == "sm_90" and set(data["binaries"]) == {"sm_80", "sm_89", "sm_90"}
    for arch, found in data["binaries"].items():
        limits = architectures.ARCHITECTURES[arch]
        for entry in found.values():
            assert (folder / entry["file"]).read_bytes()[:4] == b"\x7fELF"
            assert (folder / entry["file"]).with_suffix(".ptx").read_text().count(".entry") == 1
            assert 0 < entry["registers"] <= 255 and entry["spills"] == 0
            assert 0 <= entry["shared"] <= limits.shared
    kernels = [one["name"] for one in data["lowered"]]
    assert sorted(kernels) == ["linear-codes"] * 3 + ["rms-norm", "swiglu"]
    assert all(error < 1e-4 for error in data["checked"].values())
    rest = sum(row["time"] for row in data["pytorch"])
    assert 0.2 < data["share"] < 1 and abs(data["share"] + rest - 1) < 1e-9
    assert "aten.add.Tensor" in {row["operator"] for row in data["pytorch"]}


def test_describe_reads_and_runs_nothing(folder: Path) -> None:
    assert BACKEND.describe(folder)["target"] == "sm_90"


def test_a_model_without_compressed_layers_runs_as_it_was() -> None:
    artifact = lower(compressed("none"), "triton", target="a100")
    names = {one["name"] for one in kernels_of(artifact.folder)["lowered"]}
    assert names == {"rms-norm", "swiglu"}
    x = torch.randn(2, 5, 64)
    assert torch.equal(artifact.load()(x), artifact.program.run(x))


def test_calls_that_were_not_compiled_get_a_tile_and_are_listed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small, large = tile(4, 2, BM=16, BN=32, SPLIT=1), tile(8, 3, BM=128, BN=64, SPLIT=1)
    facts = {"kind": "int4", "outputs": 64, "columns": 64, "group": 32, "units": 2,
             "zeros": False, "bias": False, "itemsize": 4}  # fmt: skip
    known = problem("linear-codes", **facts, rows=1)
    tiles = FallbackTiles({table_key(known): {16: small, 2048: large}})
    rows = {n: tiles(problem("linear-codes", **facts, rows=n)) for n in (1, 16, 17, 5000)}
    assert rows == {1: small, 16: small, 17: large, 5000: large} and not tiles.unknown
    other = problem("linear-codes", **{**facts, "outputs": 96}, rows=5)
    assert LINEAR_CODES.legal(tiles(other), other) is None and list(tiles.unknown) == [other.text]
    tiles(other)
    said = [r.getMessage() for r in caplog.records if "beforehand" in r.getMessage()]
    assert len(said) == 1 and "outputs=96" in said[0]


@pytest.mark.parametrize(
    ("options", "code"),
    [({"device": "tpu"}, "unknown-device-choice"), ({"device": "cuda"}, "no-gpu")],
)
def test_devices_that_are_not_there(folder: Path, options: dict, code: str) -> None:
    with pytest.raises((UsageError, LoweringError)) as caught:
        mopt.load(folder, **options)
    assert caught.value.code == code


def test_a_gpu_that_no_binary_is_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(LoweringError) as caught:
        mopt.load(folder, device="cuda")
    assert caught.value.code == "no-binary-for-gpu" and "7.5" in str(caught.value)
    with pytest.raises(LoweringError) as here:
        architectures.architecture_of("host")
    assert here.value.code == "no-gpu-target" and "7.5" in str(here.value)


def test_a_driver_that_refuses_a_binary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """CUDA's driver, which finds no code for its chip."""

        def cuModuleLoadData(self, module: object, code: bytes) -> int:
            assert code[:4] == b"\x7fELF"
            return 209

        def cuGetErrorName(self, status: ctypes.c_int, text: object) -> int:
            text._obj.value = b"CUDA_ERROR_NO_BINARY_FOR_GPU"  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    stream = SimpleNamespace(synchronize=lambda: None, cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    with Folder(folder) as opened:
        stored = read_kernels(opened)
        binaries = {
            key: read_binary(opened, entry) for key, entry in stored.binaries["sm_90"].items()
        }
    program = compressed("int4-weight")
    module = program.copy().graph_module
    layers = replace(module, find_sites(module)[0])
    runner = StoredRunner(binaries)
    for layer in layers:
        layer.bind(runner.run, FallbackTiles(stored.tables["sm_90"]))
    with pytest.raises(LoweringError) as caught:
        module(torch.randn(2, 5, 64))
    assert caught.value.code == "no-binary-for-gpu"
    assert "CUDA_ERROR_NO_BINARY_FOR_GPU" in str(caught.value) and "trust" in str(caught.value.hint)


def test_other_backends_have_no_choice_of_device(tmp_path: Path) -> None:
    saved = lower(compressed("none"), "eager").save(tmp_path / "eager")
    with pytest.raises(UsageError) as caught:
        mopt.load(saved, device="cuda")
    assert caught.value.code == "no-device-choice"


def test_targets_that_are_no_gpu() -> None:
    with pytest.raises(LoweringError) as caught:
        architectures.architecture_of("cortex-m7")
    assert caught.value.code == "no-gpu-target" and "h200" in str(caught.value.hint)
    with pytest.raises(UsageError) as unknown:
        architectures.find_architecture("sm_91")
    assert unknown.value.code == "unknown-architecture" and "sm_90" in str(unknown.value.hint)


def test_binaries_run_on_later_chips_of_their_generation() -> None:
    def name(major: int, minor: int) -> str | None:
        found = architectures.running_architecture(major, minor)
        return found.name if found else None

    assert [name(8, 0), name(8, 6), name(8, 9), name(9, 0)] == ["sm_80", "sm_80", "sm_89", "sm_90"]
    assert name(7, 5) is None and name(10, 0) is None


def test_altered_kernels_are_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    victim = next(copied.glob("kernels/sm_90/*.cubin"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError) as caught:
        mopt.load(copied)
    assert caught.value.code == "altered-artifact"
