"""mopt compile: from a model in a file to an artifact, and what is said about bad input."""

from __future__ import annotations

import errno
import json
import os
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from mopt.lowering import Artifact, load, read_manifest
from mopt.recipe import Recipe
from tests.cli.command_line import NET, Call

QUICK = ("-b", "eager", "-r", "int8-weight", "--no-measure")


def write(name: str, text: str) -> None:
    Path(name).write_text(NET + text)


# ---- it works


def test_the_default_output_is_named_after_the_model_and_runs(mopt: Call, net: str) -> None:
    done = mopt("compile", net, *QUICK)
    assert done.code == 0, done.err
    assert Path("out/net/manifest.json").is_file()
    with load("out/net") as loaded:
        assert loaded(torch.zeros(4, 256)).shape == (4, 8)
    # The answer is on stdout, how it went on stderr.
    assert "smaller" in done.out
    assert done.out.splitlines()[-1].startswith("Wrote out/net")
    assert "measured" in done.out
    assert "--no-measure" in done.out
    assert "output drift" in done.out
    for stage in ("Loading", "Capturing", "Compressing", "Lowering"):
        assert sum(line.startswith(stage) for line in done.err.splitlines()) == 1
        assert stage not in done.out


def test_layers_left_alone_are_counted_by_reason(mopt: Call, net: str) -> None:
    done = mopt("compile", net, *QUICK)
    assert "Kept as they were: 1 of 2 layers" in done.out
    assert "1 x 512 weights are fewer than min_size 4096" in done.out
    done = mopt("compile", net, *QUICK, "--force", "--set", "quantize-weights.min_size=0",
                "--set", "quantize-weights.group=64")  # fmt: skip
    assert "Kept as they were" not in done.out


def test_quiet_prints_the_last_line_and_verbose_every_pass(mopt: Call, net: str) -> None:
    done = mopt("compile", net, *QUICK, "-q")
    assert done.code == 0
    assert done.err == ""
    assert len(done.out.splitlines()) == 1
    done = mopt("compile", net, *QUICK, "-v", "--force")
    passes = [line.split()[:2] for line in done.err.splitlines() if line.startswith("  ")]
    assert ["quantize-weights", "changed,"] in passes
    assert ["fold-batch-norm", "unchanged,"] in passes


def test_json_is_one_document_whatever_the_model_prints(mopt: Call, place: Path) -> None:
    write("net.py", """
import os, sys
print("at import")

class Loud(Net):
    def forward(self, x):
        print("from python")
        os.write(1, b"from C\\n")
        return super().forward(x)

def loud():
    print("in the factory")
    return {"model": Loud(), "example_inputs": batch(0)}
""")  # fmt: skip
    done = mopt("compile", "net.py:loud", *QUICK, "--json")
    assert done.code == 0, done.err
    data = done.document
    assert data["artifact"] == "out/loud"
    assert data["budget_met"] is True
    assert data["report"]["model"] == "loud"
    assert data["report"]["result"]["size_bytes"] < data["report"]["baseline"]["size_bytes"]
    for said in ("at import", "in the factory", "from python", "from C"):
        assert said in done.err
    # The same words must not reach a pipe in the other form either.
    done = mopt("compile", "net.py:loud", *QUICK, "--force")
    assert "from python" not in done.out
    assert "from C" not in done.out


def test_the_metric_of_the_user_is_in_the_table(mopt: Call, net: str) -> None:
    done = mopt("compile", net, *QUICK, "--eval", "net.py:evaluate")
    assert done.code == 0, done.err
    row = next(line for line in done.out.splitlines() if line.startswith("score"))
    assert row.split() == ["score", "0.5", "0.5", "the", "same", "measured"]
    assert "output drift" not in done.out


def test_zoo_models_come_with_data_and_metric(mopt: Call) -> None:
    done = mopt("compile", "zoo:digits-cnn", "-b", "eager", "-r", "none", "--no-measure")
    assert done.code == 0, done.err
    assert any(line.startswith("accuracy") for line in done.out.splitlines())


def test_calibration_from_a_file_is_used(mopt: Call, net: str) -> None:
    np.savez("calib.npz", x=np.random.default_rng(0).normal(size=(20, 256)))
    done = mopt("compile", net, *QUICK, "--calib", "calib.npz")
    assert done.code == 0, done.err
    assert "measured on 5 batches" in done.out


def test_example_inputs_from_a_file(mopt: Call, net: str) -> None:
    write("net.py", "def bare():\n    return Net()\n")
    np.savez("x.npz", x=np.zeros((2, 256), np.float32))
    done = mopt("compile", "net.py:bare", *QUICK, "--inputs", "x.npz")
    assert done.code == 0, done.err


def test_the_seed_and_the_recipe_are_kept_in_the_artifact(mopt: Call, net: str) -> None:
    assert mopt("compile", net, *QUICK, "--seed", "7", "-o", "here/there").code == 0
    manifest = read_manifest("here/there")
    assert manifest["seed"] == 7
    assert "quantize-weights" in manifest["recipe"]


# ---- dry run


def test_dry_run_prints_a_recipe_that_gives_itself_back(mopt: Call, net: str) -> None:
    first = mopt("compile", net, "-r", "int4-weight", "--dry-run",
                 "--set", "quantize_weights.group=64")  # fmt: skip
    assert first.code == 0
    assert first.err == ""
    data = tomllib.loads(first.out)
    weights = next(one for one in data["pass"] if one["name"] == "quantize-weights")
    assert weights["group"] == 64
    assert weights["min_size"] == 4096
    Path("mine.toml").write_text(first.out)
    assert mopt("compile", net, "-r", "mine.toml", "--dry-run").out == first.out
    assert not Path("out").exists()
    as_json = mopt("compile", net, "-r", "mine.toml", "--dry-run", "--json").document
    assert Recipe.from_toml(as_json["toml"]) == Recipe.from_toml(first.out)


# ---- budgets


def test_a_missed_budget_is_1_and_the_artifact_is_there(mopt: Call, net: str) -> None:
    done = mopt("compile", net, *QUICK, "--budget", "size<=1kB")
    assert done.code == 1
    assert "error[budget-not-met]" in done.err
    assert "size<=1kB" in done.err
    assert "Wrote out/net" in done.out
    load("out/net").close()
    done = mopt("compile", net, *QUICK, "--budget", "size<=1kB", "--force", "--json")
    assert done.code == 1
    assert done.document["budget_met"] is False
    assert "size<=1kB" in done.document["budget_missed"]


def test_a_met_budget_is_0(mopt: Call, net: str) -> None:
    done = mopt("compile", net, *QUICK, "--budget", "size<=0.5x", "--budget", "quality>=0.9")
    assert done.code == 0, done.err


# ---- refused before any work


def test_an_output_that_exists_is_refused_before_the_model_is_loaded(
    mopt: Call, place: Path
) -> None:
    write("net.py", "open('ran', 'w').close()\n")
    Path("out/net").mkdir(parents=True)
    done = mopt("compile", "net.py:factory", *QUICK)
    assert done.code == 2
    assert "error[output-exists]" in done.err
    assert "--force" in done.err
    assert not Path("ran").exists()
    assert list(Path("out/net").iterdir()) == []


def test_force_replaces_only_artifacts(mopt: Call, net: str) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    done = mopt("compile", net, *QUICK, "-o", "mine", "--force")
    assert done.code == 2
    assert Path("mine/thesis.txt").read_text() == "years of work"
    assert mopt("compile", net, *QUICK).code == 0
    before = read_manifest("out/net")
    assert mopt("compile", net, "-b", "eager", "-r", "none", "--no-measure", "--force").code == 0
    assert read_manifest("out/net")["files"] != before["files"]


WATCHED = """
def watched():
    open("ran", "w").close()
    return factory()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-r", "int8-dynamik"], "unknown-recipe", "did you mean 'int8-dynamic'?"),
        (["-r", "no/such.toml"], "missing-file", "no/such.toml"),
        (["-r", "broken.toml"], None, "broken.toml"),
        (["--set", "quantize-weight.bits=8"], "unknown-pass", "did you mean 'quantize-weights'?"),
        (["--set", "quantize-static.percentile=99"], "pass-not-in-recipe", "the recipe runs"),
        (["--set", "bits=8"], "bad-set", "pass.option=value"),
        (["--set", "quantize-weights.bit=8"], "unknown-option", "did you mean 'bits'?"),
        (["--set", "quantize-weights.bits=5"], "bad-option", "one of 2, 3, 4, 8"),
        (["-b", "onx"], "unknown-backend", "did you mean 'onnx'?"),
        (["-t", "hots"], "unknown-device", "did you mean 'host'?"),
        (["--budget", "size<3MB"], "bad-budget", "<="),
        (["--budget", "sise<=3MB"], "unknown-budget", "did you mean 'size'?"),
        (["--calib", "no.npz"], "file-not-found", "no.npz"),
        (["--calib", "what"], "bad-reference", "file.py"),
        (["--eval", "net.py"], "bad-reference", "in the file"),
        (["--seed", "x"], "usage", "not a valid integer"),
        (["--require-coverage", "90"], "usage", "range"),
        (["-o", "net.py/below"], "output-exists", "no folder"),
    ],
)
def test_what_can_be_known_early_is_refused_before_the_model_is_made(
    mopt: Call, place: Path, arguments: list[str], code: str | None, said: str
) -> None:
    write("net.py", WATCHED)
    Path("broken.toml").write_text("[[pass]\n")
    done = mopt("compile", "net.py:watched", *QUICK, *arguments)
    assert done.code == 2
    assert done.out == ""
    assert code is None or f"error[{code}]" in done.err
    assert said in done.err
    assert not Path("ran").exists()
    assert not Path("out").exists()


# ---- bad input

BAD = """
def raises():
    raise RuntimeError("no weights here")

def wrong_shape():
    return {"model": Net(), "example_inputs": (torch.zeros(4, 255),)}

def nan_weights():
    model = Net()
    model.second.weight.data[3, 3] = float("nan")
    return {"model": model, "example_inputs": batch(0)}

def calibration(batches):
    return {"model": Net(), "example_inputs": batch(0), "calibration": batches}

def calibration_of_wrong_shape():
    return calibration([(torch.zeros(4, 257),)])

def calibration_that_is_empty():
    return calibration([])

def calibration_that_raises():
    def batches():
        yield batch(0)
        raise OSError("disk on fire")
    return calibration(batches)

def evaluate_raises(run):
    run(*batch(0))
    raise ValueError("labels are missing")

def evaluate_gives_text(run):
    return "good"

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
    return {"model": Partly(), "example_inputs": batch(0)}
"""


@pytest.mark.parametrize(
    ("factory", "arguments", "code", "said"),
    [
        ("raises", [], "factory-failed", "no weights here"),
        ("wrong_shape", [], "model-does-not-run", "(4, 255)"),
        ("nan_weights", [], "non-finite-weight", "'second.weight' holds NaN"),
        ("calibration_of_wrong_shape", [], None, "257"),
        ("calibration_that_is_empty", [], "empty-calibration", "no batches"),
        ("calibration_that_raises", [], "calibration-failed", "disk on fire"),
        ("factory", ["--eval", "net.py:evaluate_raises"], "evaluate-failed", "labels are missing"),
        ("factory", ["--eval", "net.py:evaluate_gives_text"], "bad-metric", "'good'"),
        ("factory", ["--calib", "short.npz"], "calibration-shape", "(4, 256)"),
        ("partly", ["--require-coverage", "1"], "coverage", "net.py"),
        ("factory", ["--max-minutes", "0.0001"], "max-minutes", "time is up"),
    ],
)
def test_bad_input_is_2_says_why_and_writes_nothing(
    mopt: Call, place: Path, factory: str, arguments: list[str], code: str | None, said: str
) -> None:
    write("net.py", BAD)
    np.savez("short.npz", x=np.zeros(256))
    done = mopt("compile", f"net.py:{factory}", *QUICK, *arguments)
    assert done.code == 2, done.err
    assert code is None or f"error[{code}]" in done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not Path("out").exists()


def test_the_users_traceback_is_trimmed_and_whole_with_v(mopt: Call, place: Path) -> None:
    write("net.py", BAD)
    done = mopt("compile", "net.py:raises", *QUICK)
    assert "net.py" in done.err
    assert "in raises" in done.err
    assert "user_code.py" not in done.err
    assert "Traceback" in mopt("compile", "net.py:raises", *QUICK, "-v").err


def test_parts_that_stay_eager_are_named(mopt: Call, place: Path) -> None:
    write("net.py", BAD)
    done = mopt("compile", "net.py:partly", *QUICK)
    assert done.code == 0, done.err
    assert "the rest runs in PyTorch as before" in done.out
    assert "net.py" in done.out


def test_a_full_disk_while_saving_is_2(
    mopt: Call, net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")

    monkeypatch.setattr(Artifact, "save", full)
    done = mopt("compile", net, *QUICK)
    assert done.code == 2
    assert "error[disk-full]" in done.err
    assert not Path("out").exists()


def test_names_from_the_model_cannot_act_on_the_terminal(mopt: Call, place: Path) -> None:
    write("net.py", """
class Hostile(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("\\x1b[2J::add-mask::", nn.Linear(256, 8))
    def forward(self, x):
        return next(self.children())(x)

def hostile():
    return {"model": Hostile(), "example_inputs": batch(0)}
""")  # fmt: skip
    done = mopt("compile", "net.py:hostile", *QUICK, "-v")
    done2 = mopt("inspect", "net.py:hostile")
    for text in (done.out, done.err, done2.out, done2.err):
        assert "\x1b" not in text
        assert not any(line.lstrip().startswith("::") for line in text.splitlines())


def test_pt2_needs_trust(mopt: Call, place: Path) -> None:
    exported = torch.export.export(torch.nn.Linear(64, 8), (torch.zeros(4, 64),))
    torch.export.save(exported, "saved.pt2")
    done = mopt("compile", "saved.pt2", *QUICK)
    assert done.code == 2
    assert "error[untrusted-file]" in done.err
    done = mopt("compile", "saved.pt2", *QUICK, "--trust")
    assert done.code == 0, done.err
    assert "ran code from the file" in done.err
    assert json.loads(Path("out/saved/manifest.json").read_text())["model"] == "saved"
