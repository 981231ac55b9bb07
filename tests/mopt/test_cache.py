"""The cache of records: by content, immutable, dropped when damaged, never in the way."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from mopt.cache import Cache, source_hash

KEY = {"weight": "abc", "format": "int4-g32", "batches": 2}


def the_record(folder: Path) -> Path:
    (found,) = folder.rglob("*.json")
    return found


def test_keeps_values_over_processes_and_makes_them_once(tmp_path: Path) -> None:
    made = []

    def make() -> float:
        made.append(1)
        return 0.25

    assert Cache(tmp_path / "c").remember("loss", KEY, make) == 0.25
    again = Cache(tmp_path / "c")
    assert again.remember("loss", KEY, make) == 0.25
    assert len(made) == 1
    assert (again.hits, again.misses) == (1, 0)
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("name", sorted(KEY))
def test_every_part_of_the_key_counts(tmp_path: Path, name: str) -> None:
    cache = Cache(tmp_path)
    cache.put("loss", KEY, 1.0)
    assert cache.get("loss", {**KEY, name: "other"}) is None
    assert cache.get("time", KEY) is None
    assert cache.get("loss", dict(reversed(KEY.items()))) == 1.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.25", "0.75"),
        lambda text: text.replace("int4-g32", "int4-g64"),
        lambda text: "[]",
        lambda text: "",
        lambda text: '{"key": NaN}',
    ],
    ids=["torn", "value", "key", "list", "empty", "not-json"],
)
def test_a_damaged_record_is_a_miss_and_is_dropped(tmp_path: Path, damage) -> None:
    cache = Cache(tmp_path)
    cache.put("loss", KEY, 0.25)
    path = the_record(tmp_path)
    path.write_text(damage(path.read_text()))
    assert cache.get("loss", KEY) is None
    assert not path.exists()
    assert cache.remember("loss", KEY, lambda: 0.5) == 0.5
    assert cache.get("loss", KEY) == 0.5


def test_long_keys_are_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    keys = [
        {"formats": {f"layer.{i}": "int4-g128" for i in range(n)}} for n in (20, 60, 100, 130, 500)
    ]
    for index, key in enumerate(keys):
        cache.put("found", key, {"index": index})
    assert [cache.get("found", key) for key in keys] == [{"index": i} for i in range(5)]
    assert not caplog.records


def test_a_collision_of_hashes_is_a_miss(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("loss", KEY, 0.25)
    path = the_record(tmp_path)
    record = json.loads(path.read_text())
    cache.put("loss", {"other": 1}, 0.5)
    record["key"] = json.dumps({"other": 1})
    path.write_text(json.dumps(record))
    assert cache.get("loss", KEY) is None


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    cache = Cache(folder)
    cache.put("loss", KEY, 0.25)
    folder.chmod(0o777)
    assert cache.get("loss", KEY) is None
    assert cache.remember("loss", KEY, lambda: 0.5) == 0.5


def test_a_folder_that_cannot_be_made_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "below")
    assert cache.remember("loss", KEY, lambda: 3) == 3
    assert cache.get("loss", KEY) is None


def test_an_error_while_making_keeps_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.remember("loss", KEY, fail)
    assert cache.get("loss", KEY) is None
    assert not list(tmp_path.rglob("*.lock"))


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    made, entered, found = [], threading.Event(), []

    def slow() -> int:
        entered.set()
        made.append(1)
        threading.Event().wait(0.2)
        return 7

    first = threading.Thread(target=lambda: found.append(Cache(tmp_path).remember("a", KEY, slow)))
    first.start()
    entered.wait()
    found.append(Cache(tmp_path).remember("a", KEY, slow))
    first.join()
    assert found == [7, 7]
    assert len(made) == 1


def test_default_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Cache().put("loss", KEY, 1)
    folder = the_record(tmp_path).parent
    assert folder.stat().st_mode & 0o077 == 0


def test_source_hash_follows_the_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("a = 1")
    other.write_text("a = 2")
    assert source_hash(str(one)) != source_hash(str(other))
    assert source_hash(str(one)) == source_hash(str(one))
