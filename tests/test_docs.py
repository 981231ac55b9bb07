"""Every block of code in README and docs does what it says: run, or parsed where that takes long.

What is not run is in ``_PARSED_ONLY`` with the reason.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import mopt
from mopt.backends.dynamo import mopt_backend
from mopt.cli.main import cli, run
from mopt.gate_config import read_config
from mopt.lowering import lower
from mopt.recipe import Recipe
from tests.cli.command_line import NET

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_PARSED_ONLY = {
    "compile": "takes minutes; the recipe it would run is printed instead",
    "check": "compiles several times: tests/cli/test_check.py",
    "init": "compiles: tests/cli/test_init.py",
    "plan": "searches for up to a minute: tests/cli/test_plan.py",
    "devices calibrate": "measures this machine for minutes: tests/cli/test_devices.py",
    "train-plan": "traces a training step: tests/cli/test_train_plan.py",
    "pareto": "compiles: tests/cli/test_pareto.py",
    "demo": "compiles a trained model three times",
    "cuda": "needs a GPU",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its language and its first line in the page."""

    page: Path
    language: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Block(page, language, line, match[2]))
    return found


def test_blocks_are_of_languages_that_are_checked() -> None:
    known = {"python", "toml", "yaml", "console", "text", "json", "csv", "c", ""}
    for page in PAGES:
        assert {match[1] for match in _FENCE.finditer(page.read_text())} <= known, page


# ---- Python


class Small(nn.Module):
    """Something to compile and to train."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [layer for _ in range(5) for layer in (nn.Linear(32, 32), nn.GELU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(32, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def names() -> dict[str, Any]:
    """What blocks take as given."""
    torch.manual_seed(0)
    model, x = Small(), torch.randn(8, 32)
    target = torch.zeros(8, dtype=torch.long)
    data = [(x, target)]
    loss = nn.functional.cross_entropy
    return {
        "__name__": __name__, "torch": torch, "mopt": mopt, "model": model, "x": x, "batch": x,
        "inputs": x, "targets": target, "data": data, "loss": loss, "loss_function": loss,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01), "weight": torch.ones(32),
    }  # fmt: skip


def pages_with_python() -> dict[Path, list[Block]]:
    found: dict[Path, list[Block]] = {}
    for block in blocks("python"):
        found.setdefault(block.page, []).append(block)
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an artifact in ``out``, where measuring is over at once."""
    from mopt import driver

    monkeypatch.chdir(tmp_path)
    if "mopt" not in torch._dynamo.list_backends():  # installed before it had entry points
        torch._dynamo.register_backend(mopt_backend, name="mopt")
    monkeypatch.setattr(
        driver, "Settings", partial(driver.Settings, measure_seconds=0.5, eager_beside=False)
    )
    program = mopt.capture(Small(), (torch.randn(8, 32),))
    lower(program, "eager").save("out")
    (tmp_path / "net.py").write_text(NET)
    yield tmp_path
    torch.compiler.reset()


@pytest.mark.parametrize("page", pages_with_python(), ids=lambda page: page.name)
def test_python_blocks_run(page: Path, place: Path) -> None:
    space: dict[str, Any] = {}
    for block in pages_with_python()[page]:
        space.update(names())  # what is given is given anew, what a page defines stays
        code = compile(block.text, str(block), "exec")
        if "device=" in block.text:
            continue  # parsed above: it needs a GPU, or an artifact for one
        exec(code, space)


# ---- data


def test_toml_blocks_are_read_by_their_readers(tmp_path: Path) -> None:
    for block in blocks("toml"):
        if "[[pass]]" in block.text:
            assert Recipe.from_toml(block.text, source=str(block)).passes(), block
        elif "[models" in block.text:
            path = tmp_path / "mopt.toml"
            path.write_text(block.text)
            assert read_config(path).models, block
        else:
            raise AssertionError(f"{block} is for no reader that is known here")


def test_yaml_blocks_are_yaml() -> None:
    for block in blocks("yaml"):
        assert isinstance(yaml.safe_load(block.text), dict), block


# ---- commands


def commands() -> list[tuple[Block, str]]:
    """The lines after a prompt, without the remarks behind them."""
    found = []
    for block in blocks("console"):
        for line in block.text.splitlines():
            if line.startswith("$ "):
                found.append((block, re.sub(r"\s+# .*", "", line[2:])))
    return found


def test_commands_name_files_that_exist() -> None:
    for block, line in commands():
        words = shlex.split(line.partition("&&")[0])
        if words[0] == "python":
            file = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
            assert (ROOT / file).is_file(), block
        else:
            assert words[0] in ("mopt", "make", "cat", "git", "python3", "pip"), block


def _parsed(words: list[str]) -> None:
    """Let click read a command line; it raises for what it does not know."""
    context: Any = None
    command: Any = cli
    while True:
        context = command.make_context(command.name or "mopt", list(words), parent=context)
        if not hasattr(command, "get_command"):
            return
        words = [*context._protected_args, *context.args]
        _, command, words = command.resolve_command(context, words)


def test_commands_run(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mopt.models import _listing

    zoo = {listing.name for listing in _listing.names()}
    program = mopt.capture(Small(), (torch.randn(8, 32),))
    lower(program, "eager").save("out/digits-cnn", force=True)
    for block, line in commands():
        words = shlex.split(line)
        if words[0] != "mopt":
            continue
        for name in re.findall(r"zoo:([\w-]+)", line):
            assert name in zoo, f"{block}: no {name} in the zoo"
        verb = " ".join(words[1:3])
        _parsed(words[1:])
        if words[1] == "compile" and "hf:" not in line:
            assert run([*words[1:], "--dry-run"]) == 0, f"{block}: {capfd.readouterr().err}"
        elif not {words[1], verb} & set(_PARSED_ONLY):
            assert run(words[1:]) == 0, f"{block}: {capfd.readouterr().err}"
