"""The whole road through the Python API, without timing: artifacts, reports, budgets, islands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

import mopt
from mopt.driver import Settings
from mopt.errors import BudgetNotMet, InputError, MoptError, UsageError

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "report-schema.json"
QUIET = Settings(measure=False)


class Mixer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(500, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embedding(ids)
        x = x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))
        return {"hidden": x, "pooled": x.mean(1)}


def _inputs(rows: int = 2, seed: int = 0) -> tuple[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 500, (rows, 6), generator=generator),)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return Mixer()


@pytest.fixture(scope="module")
def artifact() -> mopt.Artifact:
    return mopt.compile(
        _model().train(),
        _inputs(),
        recipe="int8-dynamic",
        dynamic_shapes={"ids": {0: torch.export.Dim("batch")}},
        calibration=[_inputs(seed=s) for s in range(3)],
        evaluate=lambda run: {"metric": "norm", "value": float(run(*_inputs())["pooled"].norm()),
                              "higher_is_better": True},
        name="mixer",
        settings=QUIET,
    )  # fmt: skip


def test_the_report_follows_its_schema(artifact: mopt.Artifact) -> None:
    assert artifact.report is not None
    data = json.loads(artifact.report.to_json())
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    assert data["result"]["size_bytes"] < 0.5 * data["baseline"]["size_bytes"]
    formats = {row["path"]: row["format"] for row in data["layers"]}
    assert formats == {"embedding": "int8-row", "up": "int8-dynamic", "down": "int8-dynamic"}
    assert data["quality"]["metric"] == "norm" and data["parity"]["sizes_checked"] == 2
    assert all(row["source"].endswith(f"test_driver.py:{row['source'].split(':')[-1]}")
               and not row["source"].startswith("/") for row in data["layers"])  # fmt: skip
    metrics = artifact.report.metrics()
    assert metrics["size_bytes/measured"] == artifact.size_bytes
    assert all(math.isfinite(value) for value in metrics.values())


def test_saved_and_loaded_it_gives_the_same_outputs(
    artifact: mopt.Artifact, tmp_path: Path
) -> None:
    folder = artifact.save(tmp_path / "out")
    assert {p.name for p in folder.iterdir()} == {
        "model.onnx", "manifest.json", "report.json", "sample.npz"
    }  # fmt: skip
    ids = _inputs(5, seed=9)[0]
    with artifact.load() as run, mopt.load(folder) as again:
        expected = run(ids)
        found = again(ids)
        arrays = again(ids.numpy())
    assert torch.equal(found["hidden"], expected["hidden"]) and found.pooled.shape == (5, 64)
    assert isinstance(arrays["hidden"], np.ndarray)
    with torch.no_grad():
        original = _model().eval()(ids)["hidden"]
    assert torch.nn.functional.cosine_similarity(original, found["hidden"], -1).min() > 0.999
    with pytest.raises(UsageError) as caught:
        artifact.save(folder)
    assert caught.value.code == "output-exists"


def test_the_users_model_is_untouched() -> None:
    model = _model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    mopt.compile(model, _inputs(), recipe="int4-weight", backend="eager", settings=QUIET)
    assert model.training and model.dropout.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_missed_budget_carries_the_artifact() -> None:
    with pytest.raises(BudgetNotMet) as caught:
        mopt.compile(
            _model(), _inputs(), recipe="int8-dynamic", backend="eager", budget="size<=1kB",
            settings=QUIET,
        )  # fmt: skip
    assert "size<=1kB" in str(caught.value)
    assert caught.value.artifact.report is not None


class Wandering(nn.Module):
    """A loop whose length depends on a value, and numpy in forward: islands."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(96, 96)
        self.second = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(x.abs().sum()) % 3 + 1):
            x = torch.tanh(self.first(x))
        return self.second(torch.from_numpy(np.abs(x.detach().numpy())))


def test_islands_are_compressed_and_need_the_module_to_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Wandering(), torch.randn(3, 96)
    artifact = mopt.compile(model, (x,), recipe="int8-dynamic", settings=QUIET)
    assert artifact.report is not None
    coverage = artifact.report.data["coverage"]
    assert coverage["outside"] and "depends on a tensor's value" in coverage["outside"][0]["reason"]
    folder = artifact.save(tmp_path / "out")
    with pytest.raises(UsageError) as caught:
        mopt.load(folder)
    assert caught.value.code == "needs-module"
    with torch.no_grad():
        expected = model(x)
    for run in (artifact.load(), mopt.load(folder, module=model)):
        found = run(x)
        assert torch.nn.functional.cosine_similarity(expected, found, -1).min() > 0.999
        assert not torch.equal(expected, found)
        run.close()
    with pytest.raises(MoptError) as refused:
        mopt.compile(model, (x,), require_coverage=1.0, settings=QUIET)
    assert refused.value.code == "coverage"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"recipe": "int8-dynamik"}, "unknown-recipe"),
        ({"backend": "onx"}, "unknown-backend"),
        ({"budget": "size<=3parsec"}, "bad-budget-unit"),
        ({"example_inputs": (torch.randn(2, 6),)}, "model-does-not-run"),
        ({"example_inputs": "ids"}, "bad-example-inputs"),
        ({"recipe": "int8-static"}, "pass-requires"),
        ({"recipe": "int8-static", "calibration": []}, "empty-calibration"),
        ({"model": "resnet"}, "not-a-module"),
    ],
)
def test_wrong_calls_say_what_to_do(change: dict[str, object], code: str) -> None:
    arguments: dict[str, object] = {"model": _model(), "example_inputs": _inputs()} | change
    with pytest.raises(MoptError) as caught:
        mopt.compile(arguments.pop("model"), arguments.pop("example_inputs"),  # type: ignore[arg-type]
                     settings=QUIET, **arguments)  # type: ignore[arg-type]  # fmt: skip
    assert caught.value.code == code
    assert caught.value.hint


def test_weights_that_are_not_numbers_are_refused() -> None:
    model = _model()
    with torch.no_grad():
        model.up.weight[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"up\.weight"):
        mopt.compile(model, _inputs(), settings=QUIET)
