"""Exit codes, streams and start-up of the command as a whole."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mopt import __version__
from mopt.cli import models as models_command
from mopt.errors import InputError
from tests.cli.command_line import Call, start

HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "transformers", "rich")


def _raise(error: BaseException) -> object:
    def names() -> None:
        raise error

    return names


# ---- start-up


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], HEAVY),
        (["--version"], HEAVY),
        (["compile", "--help"], HEAVY),
        (["no-such-command"], HEAVY),
        (["passes", "list"], HEAVY[:-1]),
        (["models", "list"], HEAVY[:-1]),
        (["recipes", "list"], HEAVY[:-1]),
    ],
)
def test_light_commands_import_nothing_heavy(arguments: list[str], forbidden: list[str]) -> None:
    code = (
        "import sys; from mopt.cli.main import run; run(sys.argv[1:]); "
        f"print('loaded:', [m for m in {forbidden!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "loaded: []"


def _cpu_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start(*arguments).communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 0.3), (["passes", "list"], 0.5)])
def test_help_and_lists_are_instant(arguments: list[str], limit: float) -> None:
    # Processor time: a busy machine makes it wait, but does not make it work more.
    assert min(_cpu_seconds(*arguments) for _ in range(3)) < limit


def test_help_lists_every_command_with_the_first_line_of_its_file(mopt: Call) -> None:
    done = mopt("--help")
    assert done.code == 0
    for name in ("compile", "inspect", "models", "passes", "recipes", "run", "verify"):
        assert f"\n  {name}" in done.out
    assert "The zoo of models that come with mopt" in done.out


def test_version(mopt: Call) -> None:
    assert mopt("--version").out == f"mopt {__version__}\n"


# ---- exit codes and messages


def test_wrong_usage_is_2_with_a_hint(mopt: Call) -> None:
    done = mopt("models", "list", "--jsno")
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error[usage]: no such option '--jsno'")
    assert "hint: see mopt models list --help" in done.err


def test_an_unknown_command_names_the_nearest(mopt: Call) -> None:
    done = mopt("complie", "zoo:bert")
    assert done.code == 2
    assert "error[unknown-command]: no command is called 'complie'" in done.err
    assert "did you mean 'compile'?" in done.err
    done = mopt("passes", "lst")
    assert "no command is called 'lst'" in done.err
    assert "did you mean 'list'?" in done.err


def test_no_command_shows_the_help_and_is_2(mopt: Call) -> None:
    done = mopt()
    assert done.code == 2
    assert done.out == ""
    assert "Commands:" in done.err


def test_a_defect_is_3_and_leaves_a_file_to_attach(
    mopt: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(models_command, "names", _raise(KeyError("lost")))
    done = mopt("models", "list")
    assert done.code == 3
    assert "error[internal]: mopt failed: KeyError" in done.err
    assert "this is a defect of mopt" in done.err
    assert "mopt models list" in done.err
    assert "Traceback" not in done.err
    (crash,) = tmp_path.glob("mopt-crash-*.txt")
    assert str(crash) in done.err
    text = crash.read_text()
    assert "command: mopt models list" in text
    assert "KeyError: 'lost'" in text
    assert f"mopt: {__version__}" in text


def test_verbose_shows_the_traceback_of_a_defect(
    mopt: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(models_command, "names", _raise(KeyError("lost")))
    assert "Traceback" in mopt("models", "list", "-v").err


def test_json_errors_are_one_document_on_stdout_and_words_on_stderr(mopt: Call) -> None:
    done = mopt("passes", "explain", "quantise-weights", "--json")
    assert done.code == 2
    assert done.document["error"]["code"] == "unknown-pass"
    assert "quantize-weights" in done.document["error"]["hint"]
    assert done.err.startswith("error[unknown-pass]:")
    # Also when the command line itself cannot be read.
    assert mopt("models", "list", "--json", "--nope").document["error"]["code"] == "usage"


def test_names_in_errors_are_escaped(mopt: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    error = InputError("layer \x1b[31m\u202e", code="bad", hint="\x9b", site="\x07.py:1")
    monkeypatch.setattr(models_command, "names", _raise(error))
    done = mopt("models", "list")
    assert done.code == 2
    assert all(c.isprintable() for c in done.err.replace("\n", ""))
    assert "\\x1b[31m\\u202e" in done.err


def test_a_full_disk_and_full_memory_are_2(mopt: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOSPC, errno.EFBIG):
        full = OSError(number, os.strerror(number), "/somewhere/file")
        monkeypatch.setattr(models_command, "names", _raise(full))
        done = mopt("models", "list")
        assert done.code == 2
        assert "error[disk-full]: no space is left on the disk of '/somewhere/file'" in done.err
    monkeypatch.setattr(models_command, "names", _raise(MemoryError()))
    done = mopt("models", "list")
    assert done.code == 2
    assert "error[out-of-memory]" in done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_on_a_full_disk_is_2_even_for_json() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 a device
        for arguments in (["models", "list"], ["models", "list", "--json"], ["--json", "nope"]):
            process = start(*arguments)
            process.communicate()
            done = subprocess.run(process.args, stdout=full, stderr=subprocess.PIPE, check=False)
            assert done.returncode == 2
            assert b"Traceback" not in done.stderr


# ---- streams


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("models", "list")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_colour_only_where_asked(mopt: Call) -> None:
    assert "\x1b[" not in mopt("models", "list", "--jsno").err
    assert "\x1b[" in mopt("models", "list", "--color", "always").out
    assert "\x1b[" not in mopt("models", "list", "--color", "never").out


def test_options_are_read_from_the_environment(mopt: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPT_JSON", "1")
    assert {entry["name"] for entry in mopt("models", "list").document["models"]} >= {"bert"}


def test_common_options_may_stand_before_the_command(mopt: Call) -> None:
    assert mopt("--json", "recipes", "list").document["recipes"]
    assert mopt("recipes", "--json", "list").document["recipes"]


def test_shells_can_complete_command_names() -> None:
    variables = {"_MOPT_COMPLETE": "bash_complete", "COMP_WORDS": "mopt ins", "COMP_CWORD": "1"}
    out, err = start(env={**os.environ, **variables}).communicate()
    assert out.splitlines() == ["plain,inspect"], err
