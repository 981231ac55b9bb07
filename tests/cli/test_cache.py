"""mopt cache: what is in it, and how it gets smaller."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mopt.cache import Cache
from tests.cli.command_line import Call


@pytest.fixture
def cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    found = Cache()
    assert str(found.folder).startswith(str(place))
    return found


def test_an_absent_cache_is_empty(mopt: Call, cache: Cache) -> None:
    assert mopt("cache", "info", "--json").document["bytes"] == 0
    assert mopt("cache", "clean", "--json").document == {"removed": 0, "bytes": 0}


def test_info_and_clean(mopt: Call, cache: Cache) -> None:
    cache.put("timing", {"a": 1}, 2)
    cache.put("sensitivity", {"a": 1}, [3, 4])
    data = mopt("cache", "info", "--json").document
    assert [row["records"] for row in data["buckets"]] == [1, 1] and data["bytes"] > 0
    assert "2 records" in mopt("cache", "info").out
    assert mopt("cache", "clean", "--json").document["removed"] == 2
    assert cache.get("timing", {"a": 1}) is None


def test_prune_removes_what_is_old_or_unreadable(mopt: Call, cache: Cache) -> None:
    for key in (1, 2):
        cache.put("timing", {"a": key}, key)
    (old, _) = sorted((cache.folder / "timing-v1").iterdir())
    long_ago = time.time() - 40 * 86_400
    os.utime(old, (long_ago, long_ago))
    (cache.folder / "timing-v0").mkdir()
    (cache.folder / "timing-v0" / "x.json").write_text("{}")
    assert mopt("cache", "prune", "--json").document["removed"] == 2
    assert mopt("cache", "prune", "--json").document["removed"] == 0


def test_links_out_of_the_cache_are_left_alone(mopt: Call, cache: Cache, place: Path) -> None:
    cache.put("timing", {"a": 1}, 2)
    (place / "mine").mkdir()
    (place / "mine" / "file").write_text("precious")
    (cache.folder / "other").symlink_to(place / "mine")
    assert mopt("cache", "clean").code == 0
    assert (place / "mine" / "file").exists()
