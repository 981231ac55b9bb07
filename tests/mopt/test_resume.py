"""An interrupted compile goes on where it was, and gives the same bytes in every process."""

from __future__ import annotations

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import mopt
from mopt.cache import Cache
from mopt.driver import Settings
from mopt.lowering import Artifact
from mopt.pass_base import Progress
from tests.cli.command_line import NET, start
from tests.tiny import normal

QUIET = Settings(measure=False)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)), nn.Tanh()).eval()


class StopsAt(Progress):
    """Ctrl-C when the n-th layer is to be encoded."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def step(self, done: int, total: int, unit: str) -> None:
        if unit == "layers" and done == self.layer:
            raise KeyboardInterrupt


def compile_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, progress: Progress | None = None
) -> Artifact:
    monkeypatch.setattr("mopt.driver.Cache", partial(Cache, folder, worth_seconds=0))
    return mopt.compile(
        net(), (normal(4, 128),), recipe="int4-gptq", backend="eager", settings=QUIET,
        calibration=[(normal(4, 128, seed=i),) for i in range(3)], progress=progress,
    )  # fmt: skip


def test_layers_that_are_done_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compile_here(tmp_path / "one", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compile_here(tmp_path / "two", monkeypatch, StopsAt(3))
    made: list[str] = []
    put = Cache.put
    monkeypatch.setattr(Cache, "put", lambda *a: (made.append(a[1]), put(*a)))
    again = compile_here(tmp_path / "two", monkeypatch)
    assert made.count("encoded") == 1  # the last of four
    assert again.manifest["files"] == whole.manifest["files"]


@pytest.mark.parametrize("name", ["json", "safetensors"])
def test_a_damaged_entry_is_said_and_made_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = compile_here(tmp_path, monkeypatch)
    path = sorted(tmp_path.rglob(f"encoded-*/*.{name}"))[0]
    path.write_bytes(path.read_bytes()[:-3])
    again = compile_here(tmp_path, monkeypatch)
    assert again.manifest["files"] == whole.manifest["files"]
    told = [record.getMessage() for record in caplog.records if record.name == "mopt.cache"]
    assert len(told) == (1 if name == "json" else 2) and path.name in told[0]
    assert "is damaged: dropped, and made again" in told[0]


SLOW = """
import os, sys, time

def evaluate_once(run):
    if not os.path.exists("was-here"):
        open("was-here", "w").close()
        print("READY", file=sys.stderr, flush=True)
        time.sleep(60)
    return 0.5
"""


def test_kill_9_then_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET + SLOW)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["compile", "net.py:factory", "-r", "int4-gptq", "-b", "eager", "--no-measure",
                 "--eval", "net.py:evaluate_once", "--threads", "1"]  # fmt: skip

    def begin(seed: str, output: str) -> subprocess.Popen[str]:
        env = {**os.environ, "TMPDIR": str(scratch), "PYTHONHASHSEED": seed,
               "XDG_CACHE_HOME": str(tmp_path / "cache")}  # fmt: skip
        return start(*arguments, "-o", output, env=env, cwd=tmp_path)

    killed = begin("1", "out")
    assert killed.stderr is not None
    assert any(line.startswith("READY") for line in killed.stderr)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "out").exists()
    assert list(scratch.iterdir()) != []
    for seed, output in (("2", "out"), ("3", "other")):
        process = begin(seed, output)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert list(scratch.iterdir()) == []  # what the killed process left is gone too
    first, second = tmp_path / "out", tmp_path / "other"
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()} >= {"report.html", "log.txt"}
    for name in names - {"report.json", "report.html", "log.txt"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
