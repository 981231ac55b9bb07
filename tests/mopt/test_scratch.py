"""Folders among the temporary files: private, and gone when their process is, however it ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mopt.disk import scratch, scratch_folder

KILLED = """
import os, signal
from mopt.disk import scratch_folder
folder, _ = scratch_folder("mopt-test")
(folder / "weights").write_bytes(bytes(1000))
print(folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env={"TMPDIR": str(tmp_path)}, text=True,
        capture_output=True,
    )  # fmt: skip
    left = Path(done.stdout.strip())
    assert (left / "weights").stat().st_size == 1000
    first, remove_first = scratch_folder("mopt-test")
    assert not left.exists()
    assert first.stat().st_mode & 0o777 == 0o700
    second, remove_second = scratch_folder("mopt-test")
    assert first.exists() and second.exists()  # of this process, which lives
    remove_first(), remove_second()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_a_block_is_gone_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RuntimeError), scratch("mopt-test") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_every_folder_among_the_temporary_files_is_found_again_after_a_kill() -> None:
    import mopt

    source = Path(mopt.__file__).parent
    folders = [source, *(source.parent / name for name in ("passes", "backends", "cost_models"))]
    users = {
        str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.py")
        if "TemporaryDirectory(" in path.read_text() or "mkdtemp(" in path.read_text()
    }  # fmt: skip
    assert users == set()
