"""The GPU benchmark checks its kernels in the interpreter where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "triton_gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a fresh process, outside the checkout."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=600,
        cwd="/", check=False,
    )  # fmt: skip


def test_its_correctness_part_is_right_in_the_interpreter() -> None:
    done = run("--interpret")
    assert done.returncode == 0 and "0 wrong" in done.stdout, done.stdout + done.stderr


def test_all_of_its_sections_run_through_without_a_gpu() -> None:
    done = run("--dry-run")
    assert done.returncode == 0 and "sections not finished: none" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "as asked" in done.stdout and "Llama-8B block, int4" in done.stdout


def test_it_explains_itself() -> None:
    assert "--minutes" in run("--help").stdout
