"""Listing the zoo is quick, needs no torch and follows the files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mopt import models
from mopt.models import _listing

FOLDER = Path(models.__file__).parent

PROBE = """
import sys, time
start = time.process_time()
from mopt import models
listed = models.names()
seconds = time.process_time() - start
assert "torch" not in sys.modules, "torch was imported"
print(len(listed), seconds)
"""


def test_names_needs_no_torch_and_is_quick() -> None:
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        count, spent = done.stdout.split()
        assert int(count) == len(models.names())
        seconds.append(float(spent))
    assert min(seconds) < 0.05


def test_every_file_is_listed_once() -> None:
    listed = [listing.name for listing in models.names()]
    files = [path for path in FOLDER.glob("*.py") if not path.name.startswith("_")]
    assert listed == sorted(set(listed))
    assert len(listed) == len(files)
    assert {"pydoc-gpt", "digits-cnn", "resnet50", "bert", "llama-mini"} <= set(listed)


@pytest.mark.parametrize("listing", models.names(), ids=lambda listing: listing.name)
def test_listing_agrees_with_the_model(listing: models.Listing) -> None:
    model = models.load(listing.name)
    assert (model.name, model.summary, model.trained) == (
        listing.name,
        listing.summary,
        listing.trained,
    )
    assert listing.summary
    assert (model.evaluate is not None) == listing.trained
    assert ("untrained" in listing.summary) == (not listing.trained)


def test_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="resnet51"):
        models.load("resnet51")


def test_private_files_are_not_models() -> None:
    with pytest.raises(KeyError):
        models.load("_blocks")


@pytest.mark.parametrize("text", ['"""A model."""', 'NAME = "x"', "NAME = 3\nTRAINED = False"])
def test_a_file_without_the_constants_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.py").write_text(text)
    with pytest.raises(ValueError, match=r"odd\.py: a model file needs a string NAME"):
        _listing.read(tmp_path / "odd.py")


def test_a_file_is_read_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "new.py"
    path.write_text(
        '"""First line.\n\nMore."""\nNAME: str = "new"\nTRAINED = True\nraise SystemExit\n'
    )
    assert _listing.read(path) == models.Listing("new", "First line.", True)
