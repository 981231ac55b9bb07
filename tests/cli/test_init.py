"""mopt init: the files of a gate for a model of the user."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mopt.cli.init import WORKFLOW, config_text
from mopt.gate_config import read_config
from tests.cli import report_fixture as made
from tests.cli.command_line import Call


def test_what_is_written_is_a_gate(
    mopt: Call, net: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(*_: Any) -> Any:
        return SimpleNamespace(report=SimpleNamespace(data=made.report()))

    monkeypatch.setattr("mopt.cli.check._compile", compile)
    done = mopt("init", net, "--budget", "size<=3MB")
    assert done.code == 0, done.err
    (model,) = read_config("mopt.toml").models
    assert (model.name, model.model, model.budget) == ("net", net, ("size<=3MB",))
    assert (place / "mopt-baseline.json").is_file()
    assert "mopt check" in (place / WORKFLOW).read_text()
    assert mopt("check").code == 0
    assert "error[output-exists]" in mopt("init", net).err


def test_it_can_wait_for_the_baseline(mopt: Call, net: str, place: Path) -> None:
    done = mopt("init", net, "--no-baseline", "--no-workflow")
    assert done.code == 0 and "Next: mopt check --update-baseline" in done.out
    assert sorted(path.name for path in place.iterdir()) == ["mopt.toml", "net.py"]


def test_nobody_to_ask(mopt: Call, place: Path) -> None:
    assert "error[no-model]" in mopt("init", "--yes").err


def test_every_name_is_written_as_toml(place: Path) -> None:
    name = 'a "b"\\\n[x]'
    (place / "mopt.toml").write_text(config_text(name, name, name, (name,), name))
    (model,) = read_config("mopt.toml").models
    assert (model.name, model.model, model.budget) == (name, name, (name,))
