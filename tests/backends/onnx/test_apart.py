"""A large model that runs in a process of its own: same results, same errors, nothing left over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mopt.backends.onnx import lower as onnx_lower
from mopt.backends.onnx.apart import ApartRunner
from mopt.errors import ArtifactError, InputError, UsageError
from mopt.frontend import capture
from mopt.lowering import Artifact, lower


@pytest.fixture(name="artifact", scope="module")
def _artifact() -> Iterator[Artifact]:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    program = capture(model, (torch.randn(2, 64),), ({0: torch.export.Dim("batch")},))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_lower, "EXTERNAL_FROM_BYTES", 1024)
        yield lower(program)


def test_gives_what_the_model_gives_here(artifact: Artifact) -> None:
    with artifact.load() as here, artifact.load(apart=True) as there:
        for rows in (2, 5):
            x = torch.randn(rows, 64)
            assert torch.equal(here(x), there(x))


def test_says_what_is_wrong_with_inputs_and_goes_on(artifact: Artifact) -> None:
    runner = ApartRunner(artifact.folder / onnx_lower.MODEL, 1)
    with pytest.raises(InputError) as caught:
        runner.run([torch.randn(2, 9).numpy()])
    assert caught.value.code == "input-shape" and "float32[2, 9]" in caught.value.message
    assert runner.run([torch.randn(2, 64).numpy()])[0].shape == (2, 3)
    runner.close()
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        runner.run([])


def test_a_process_that_dies_is_an_error(artifact: Artifact) -> None:
    runner = ApartRunner(artifact.folder / onnx_lower.MODEL, 1)
    process = runner._process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(ArtifactError) as caught:
        runner.run([torch.randn(2, 64).numpy()])
    assert caught.value.code == "child-crashed" and "-9" in caught.value.message


def test_a_model_that_cannot_be_loaded_is_an_error(artifact: Artifact) -> None:
    data = artifact.folder / onnx_lower.DATA
    kept = data.read_bytes()
    data.write_bytes(kept[:100])
    with pytest.raises(ArtifactError, match="which has 100"):
        ApartRunner(artifact.folder / onnx_lower.MODEL, 1)
    data.write_bytes(kept)


def test_small_models_stay_here(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), None)
    monkeypatch.setattr(onnx_lower, "ApartRunner", None)
    with lower(program).load(apart=True) as run:
        assert run(torch.randn(2, 4)).shape == (2, 4)
