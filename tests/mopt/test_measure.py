"""Comparisons of real processes: order, errors, limits, and what a timing child reports."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import mopt.measure as measure
from mopt.bench_loop import SECONDS_VARIABLE
from mopt.errors import ArtifactError, UsageError
from mopt.machine import machine_differences, machine_fingerprint
from mopt.measure import Sample, Side, Subject, compare, measure_one

LINE = {"median_ms": 2.0, "calls": 40, "load_ms": 5.0, "peak_bytes": 100, "steady_bytes": 60}


def fake(label: str, script: str = "", **fields: object) -> Subject:
    """A model that takes no time and says what it is told to."""
    line = json.dumps({**LINE, **fields})
    return Subject(["/bin/sh", "-c", f"{script}\necho noise\necho '{line}'"], label)


def test_a_comparison_of_steady_times() -> None:
    found = compare(fake("old"), fake("new", median_ms=1.0, peak_bytes=70), tolerance=0.05)
    assert (found.pairs, found.verdict, found.stopped) == (10, "pass", "decided")
    assert found.ratio == found.low == found.high == pytest.approx(0.5)
    assert found.confidence == pytest.approx(1 - 2**-9)
    assert found.is_different and not found.overlapped
    assert (found.reference.median_ms, found.candidate.median_ms) == (2.0, 1.0)
    assert (found.reference.peak_bytes, found.candidate.peak_bytes) == (100, 70)
    assert found.candidate.steady_bytes == 60 and found.candidate.calls == 400
    data = found.as_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["pairs"] == 10 and data["reference"]["label"] == "old"


def test_equal_times_are_not_different() -> None:
    found = compare(fake("a"), fake("b"), tolerance=0.0, max_pairs=10)
    assert not found.is_different and found.ratio == 1.0


def test_slower_fails(tmp_path: Path) -> None:
    found = compare(fake("old"), fake("new", median_ms=2.5), quick=True)
    assert (found.pairs, found.verdict, found.stopped) == (8, "fail", "clear")


def test_order_within_pairs_is_random_and_repeats_with_the_seed(tmp_path: Path) -> None:
    def order(seed: int) -> str:
        log = tmp_path / f"log{seed}"
        log.unlink(missing_ok=True)
        sides = [fake(name, f"printf {name} >> {log}") for name in "RC"]
        compare(*sides, max_pairs=20, tolerance=0.0, seed=seed)
        return log.read_text()

    first = order(0)
    pairs = [first[i : i + 2] for i in range(0, len(first), 2)]
    assert len(pairs) == 20 and set(pairs) == {"RC", "CR"}
    assert order(0) == first != order(1)


def test_time_bounds_a_comparison() -> None:
    found = compare(fake("a", "sleep 0.2"), fake("b", "sleep 0.2"), max_seconds=1.5)
    assert 1 <= found.pairs <= 3
    assert (found.stopped, found.verdict) == ("time", "noisy")
    assert found.confidence == 1 - 2 ** (1 - found.pairs), "it does not claim 99 %"


def test_quick_asks_slow_models_to_hurry(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"echo ${SECONDS_VARIABLE} >> {log}"
    compare(fake("a", script), fake("b", script), quick=True, max_seconds=32)
    cuts = [float(line) for line in log.read_text().split()]
    assert cuts[0] == cuts[1] == pytest.approx(32 / 16 - 0.5, abs=0.01)
    assert min(cuts) > 1.0
    log.unlink()
    compare(fake("a", script), fake("b", script), max_pairs=1)
    assert log.read_text().split() == [], "a gate takes whole samples"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("kill -SEGV $$", "child-crashed"),
        ("exit 3", "child-failed"),
        ("exit 0", "sample-format"),
        ("echo hello; exit 0", "sample-format"),
        ("echo '[1]'; exit 0", "sample-format"),
        ("echo '{\"median_ms\": 1}'; exit 0", "sample-format"),
        ("echo '" + json.dumps({**LINE, "median_ms": 0}) + "'; exit 0", "sample-format"),
        ("echo '" + json.dumps({**LINE, "median_ms": "x"}) + "'; exit 0", "sample-format"),
        ("echo '" + json.dumps(LINE).replace("2.0", "NaN") + "'; exit 0", "sample-format"),
    ],
)
def test_a_broken_side_is_named(script: str, code: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        compare(fake("old"), fake("my-model", script))
    assert caught.value.code == code
    assert "timing 'my-model'" in caught.value.message


def test_measure_one_takes_the_median() -> None:
    side = measure_one(fake("a"), samples=2)
    assert (side.label, len(side.samples), side.median_ms, side.load_ms) == ("a", 2, 2.0, 5.0)
    no_steady = {key: value for key, value in LINE.items() if key != "steady_bytes"}
    command = ["/bin/sh", "-c", f"echo '{json.dumps(no_steady)}'"]
    assert measure_one(Subject(command, "b"), samples=1).steady_bytes is None


def test_a_halt_of_the_machine_does_not_count() -> None:
    def sample(milliseconds: float) -> Sample:
        return Sample(milliseconds, calls=5, load_ms=1.0, peak_bytes=0)

    side = Side("a", tuple(map(sample, (2.4, 561.0, 2.0)))).undisturbed()
    assert [one.median_ms for one in side.samples] == [2.4, 2.0]


@pytest.mark.parametrize("wrong", [{"tolerance": -1}, {"max_pairs": 0}, {"models": 0}])
def test_impossible_arguments(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        compare(fake("a"), fake("b"), **wrong)  # type: ignore[arg-type]


def test_never_two_measurements_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_LOCK_NAME", "\0mopt-test-measuring")
    monkeypatch.setattr(measure, "_LOCK_WAIT_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind("\0mopt-test-measuring")
        found = compare(fake("a"), fake("b"), max_pairs=1, tolerance=1.0)
        assert found.overlapped, "the report says that it was not alone"
    assert not compare(fake("a"), fake("b"), max_pairs=1).overlapped


def test_fingerprints() -> None:
    one = machine_fingerprint(threads=2)
    assert one["cores"] >= 1 and one["versions"]["numpy"] and one["threads"] == 2
    assert json.loads(json.dumps(one)) == one
    assert socket.gethostname() not in json.dumps(one)
    assert machine_differences(one, machine_fingerprint(threads=2)) == []
    other = {**one, "isa": ["avx2"], "kernel": "0", "versions": {**one["versions"], "numpy": "0"}}
    differences = machine_differences(one, other)
    assert [text.partition(":")[0] for text in differences] == ["isa", "versions"]


def bench(load: str, plan: str = "") -> dict[str, float]:
    """What a child reports that loads a model as ``load`` says."""
    script = textwrap.dedent(f"""
        import time, mmap, tempfile
        from mopt.bench_loop import BenchPlan, run_bench
        MIB = 1 << 20
        def filled(n):
            block = bytearray(n * MIB)
            block[::4096] = bytes(len(block[::4096]))
            return block
        {{}}
        print(run_bench(load, BenchPlan({plan})))
    """).format(textwrap.dedent(load))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_child_counts_private_memory() -> None:
    found = bench("def load():\n    w = filled(64)\n    return lambda: len(w)")
    assert 64 << 20 <= found["steady_bytes"] <= found["peak_bytes"] < 72 << 20
    assert found["calls"] == 40 and 0 < found["median_ms"] < 1


def test_the_child_sees_spikes_of_loading_and_running() -> None:
    loading = bench("def load():\n    w = filled(64)\n    time.sleep(.02)\n    return time.time")
    assert loading["peak_bytes"] > 64 << 20 and loading["steady_bytes"] < 8 << 20
    running = bench(
        "def load():\n    def call():\n        w = filled(64)\n        time.sleep(.005)\n"
        "    return call"
    )
    assert running["peak_bytes"] > 64 << 20 and running["steady_bytes"] < 8 << 20


def test_the_child_does_not_count_mapped_files() -> None:
    found = bench(
        "f = tempfile.TemporaryFile()\nf.truncate(64 * MIB)\n"
        "def load():\n    m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "    return lambda: m[::4096]"
    )
    assert found["peak_bytes"] < 8 << 20


def test_the_child_calls_as_often_as_the_plan_says() -> None:
    slow = "def load():\n    def call():\n        time.sleep(.03)\n    return call"
    usual = bench(slow)
    assert 5 <= usual["calls"] <= 17 and usual["median_ms"] >= 30
    assert usual["calling_ms"] >= (5 + 5) * 30
    hurried = bench(slow, "limit_seconds=0.05")
    assert hurried["calls"] <= 2 and hurried["calling_ms"] < usual["calling_ms"]
    slower = bench("def load():\n    return lambda: time.sleep(.2)", "warmup_calls=1")
    assert slower["calls"] == 5, "at least five, whatever they take"


def test_log_ratio_is_candidate_over_reference() -> None:
    found = compare(fake("a"), fake("b", median_ms=6.0), max_pairs=1)
    assert found.log_ratios == (pytest.approx(math.log(3)),)
