"""mopt devices list|show|calibrate, and devices as targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mopt.device as devices
from mopt.device_file import read_device
from mopt.device_text import device_toml
from tests.cli.command_line import Call

FAMILIES = ("linear.fp32", "pointwise.relu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings of a machine of 50 billion operations and 10 GB a second, without waiting for it."""
    from mopt.cost_models import calibrate
    from mopt.cost_models.families import families
    from mopt.cost_models.probe import Probe, ProbeRun, Sample
    from mopt.device_calibration import CallOverhead

    def run(probes: list[Probe], **more: object) -> ProbeRun:
        samples = []
        for probe in probes:
            if probe.family in FAMILIES:
                work = families()[probe.family].amount(probe.dims)
                moved = work.weight_bytes + work.activation_bytes
                us = 1 + work.flops / 5e4 + moved / 1e4
                samples.append(Sample(probe.family, probe.dims, us, 0.02, 3, True))
        return ProbeRun(tuple(samples), 0.1, 0.9, 0.5, CallOverhead(5.0, 1.0, 1e4), 1.0)

    monkeypatch.setattr(calibrate, "run_probes", run)


def test_lists_this_machine_first_and_every_profile(mopt: Call) -> None:
    done = mopt("devices", "list")
    assert done.code == 0, done.err
    rows = done.out.splitlines()
    assert rows[1].startswith("host") and "not measured" in rows[1]
    assert any(row.startswith("a100") and "Top/s" in row for row in rows)
    listed = json.loads(mopt("devices", "list", "--json").out)["devices"]
    assert {"cortex-m7", "mi300x", "pim-gpt"} <= {one["id"] for one in listed}
    assert listed[0]["is_host"] and not listed[0]["is_measured"]


def test_shows_each_number_with_its_source(mopt: Call) -> None:
    done = mopt("devices", "show", "h200-sxm")
    assert done.code == 0, done.err
    assert "NVIDIA H200 SXM" in done.out
    line = next(line for line in done.out.splitlines() if "rate fp16" in line)
    assert "989 Top/s" in line and "sheet (data-sheet)" in line and "2024-04" in line
    data = json.loads(mopt("devices", "show", "h200", "--json").out)
    assert all(number["source"] in data["sources"] for number in data["numbers"])


def test_a_profile_printed_as_toml_is_a_device(mopt: Call, place: Path) -> None:
    text = mopt("devices", "show", "cortex-m7", "--toml").out
    (place / "mine.toml").write_text(text.replace('id = "cortex-m7"', 'id = "mine"'))
    done = mopt("devices", "show", "mine.toml")
    assert done.code == 0, done.err
    assert done.out.startswith("mine  (mcu)")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("value = 256", "value = -256", "positive"),
        (', unit = "KiB"', "", "unit is missing"),
    ],
)
def test_a_wrong_number_is_named_with_file_and_line(
    mopt: Call, place: Path, old: str, new: str, said: str
) -> None:
    lines = device_toml(devices.find_device("cortex-m7")).splitlines()
    at = next(n for n, line in enumerate(lines) if 'value = 256, unit = "KiB"' in line)
    lines[at] = lines[at].replace(old, new)
    (place / "bad.toml").write_text("\n".join(lines))
    done = mopt("devices", "show", "bad.toml")
    assert done.code == 2
    assert "error[device-profile]" in done.err
    assert said in done.err
    assert f"bad.toml:{at + 1}" in done.err


def test_unknown_names_are_refused(mopt: Call) -> None:
    done = mopt("devices", "show", "h1000")
    assert done.code == 2
    assert "error[unknown-device]" in done.err and "did you mean" in done.err
    assert "error[missing-file]" in mopt("devices", "show", "no.toml").err


def test_calibrates_and_keeps_the_profile(mopt: Call, place: Path, timed: None) -> None:
    done = mopt("devices", "calibrate", "-o", "me.toml", "--seconds", "60")
    assert done.code == 0, done.err
    assert "left out of the fit are off by" in done.out
    assert "linear.fp32" in done.out and "Wrote me.toml" in done.out
    profile = read_device(place / "me.toml")
    assert profile.calibration is not None
    assert {fit.family for fit in profile.calibration.fits} <= set(FAMILIES)
    assert 0 < profile.calibration.median_error < 0.2
    shown = mopt("devices", "show", "me.toml")
    assert shown.code == 0 and "90 % within" in shown.out
    # Without -o it is what `host` means from now on.
    assert mopt("devices", "calibrate", "--seconds", "60").code == 0
    assert "this machine, measured" in mopt("devices", "list").out


def test_calibrate_refuses_what_cannot_be_a_profile(mopt: Call) -> None:
    done = mopt("devices", "calibrate", "-o", "profile.json")
    assert done.code == 2
    assert "error[profile-name]" in done.err


def test_another_processor_as_target_is_estimated_and_not_measured(mopt: Call, net: str) -> None:
    done = mopt("compile", net, "-t", "cpu-cortex-a76", "-o", "out", "--json")
    assert done.code == 0, done.err
    report = done.document["report"]
    assert report["target"] == "cpu-cortex-a76"
    assert report["speed"] is None
    assert report["result"]["latency_ms"]["measured"] is None
    assert report["result"]["latency_ms"]["estimated"] > 0
    assert report["estimates"]["device"] == "cpu-cortex-a76"
    assert report["estimates"]["result"]["level"] == "data-sheet"
    assert not report["estimates"]["is_this_machine"]
    assert abs(report["estimate_error"]["size"]) < 0.5


def test_a_limit_in_time_on_another_device_is_judged_by_the_estimate(mopt: Call, net: str) -> None:
    done = mopt("compile", net, "-t", "cpu-cortex-a76", "-r", "int8-dynamic", "-o", "out",
                "--budget", "latency<=1us")  # fmt: skip
    assert done.code == 1
    assert "latency<=1us (estimated" in done.err


def test_a_target_without_the_backend_is_refused(mopt: Call, net: str) -> None:
    done = mopt("compile", net, "-t", "a100")
    assert done.code == 2
    assert "error[target-backend]" in done.err
    assert "'onnx' does not lower for a100; it takes triton" in done.err
    done = mopt("compile", net, "-t", "pim-gpt")
    assert "error[target-backend]" in done.err
    assert "mopt pareto -t pim-gpt" in done.err
