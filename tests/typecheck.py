"""Type-check a built tree: checkers cannot see the folder mapping of setup.cfg."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def built_tree(target: Path) -> None:
    """Lay the packages out as they are installed."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    mapping = dict(
        (part.strip() for part in line.split("="))
        for line in config["options"]["package_dir"].strip().splitlines()
    )
    for package, folder in mapping.items():
        shutil.copytree(
            ROOT / folder,
            target / package.replace(".", "/"),
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"),
        )


def main() -> int:
    """Run mypy on the tree; its exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        built_tree(tree)
        command = [
            sys.executable, "-m", "mypy", "--config-file", str(ROOT / "mypy.ini"),
            "--cache-dir", str(ROOT / ".mypy_cache"), "-p", "mopt",
        ]  # fmt: skip
        return subprocess.run(command, cwd=tree, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
