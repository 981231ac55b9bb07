"""The wheel holds everything: it is built, installed outside the checkout, and asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_LEFT_OUT = (".git", ".venv", "build", "dist", "out", "__pycache__", "*.egg-info", ".*_cache")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*_LEFT_OUT))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(folder), str(folder / "source")],
        check=True,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


def test_every_source_and_data_file_is_inside(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    own = ("passes", "backends", "cost_models", "cli", "models")
    folders = {"mopt": "mopt", **{name: f"mopt/{name}" for name in own}}
    missing = []
    for folder, package in folders.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".safetensors", ".html") and path.is_file():
                inside = f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
                if inside not in names:
                    missing.append(inside)
    assert not missing


def test_it_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = home / "lib" / version / "site-packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--target", str(site), str(wheel)],
        check=True,
    )  # fmt: skip
    # The dependencies are lent from this environment; a folder on PYTHONPATH runs no .pth file,
    # so the editable install of the checkout stays out.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}

    def ask(*arguments: str) -> str:
        code = (
            "import mopt, sys; from mopt.cli.main import main; "
            "assert mopt.__file__.startswith(sys.prefix), mopt.__file__; sys.exit(main())"
        )
        done = subprocess.run(
            [python, "-c", code, *arguments], cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "0.1.0" in ask("--version")
    passes = ask("passes", "list")
    assert "fold-constants" in passes and "quantize-static" in passes
    assert "int4-weight" in ask("recipes", "list")
    assert "pydoc-gpt" in ask("models", "list")
