"""Device profiles: those that come with mopt, and what is said about one that is not sound."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mopt.device import WORK_KINDS, DeviceProfile, find_device, list_devices
from mopt.device_file import parse_device, read_device
from mopt.device_text import device_toml
from mopt.errors import InputError, LimitError, UsageError
from mopt.quantity import UNITS, Quantity

PROFILE = """\
schema = 1
id = "toy"
name = "Toy board"
kind = "npu"
class = "accelerator"
summary = "a toy"

[sources.sheet]
kind = "data-sheet"
title = "Toy data sheet"
date = "2024-05"

[[processor]]
name = "core"
memory = "dram"
launch = { value = 2, unit = "us", source = "sheet" }
peak.fp16 = { value = 4, unit = "Top/s", source = "sheet" }

[[memory]]
name = "dram"
managed = "software"
capacity = { value = 8, unit = "GiB", source = "sheet" }
bandwidth = { value = 50, unit = "GB/s", source = "sheet" }
latency = { value = 100, unit = "ns", source = "sheet" }
"""
SHIPPED = list_devices()
REQUIRED = (
    "cpu-avx2", "cpu-avx512-vnni", "cpu-amx", "cpu-cortex-a76", "a100", "h100", "h200", "l4",
    "rtx4090", "jetson-orin", "mi300x", "apple-m1", "cortex-m7", "pim-gpt", "duplex", "flightllm",
    "sn40l", "bitmod",
)  # fmt: skip


def line_of(text: str) -> int:
    return PROFILE[: PROFILE.index(text)].count("\n") + 1


def changed(old: str, new: str) -> str:
    assert PROFILE.count(old) == 1
    return PROFILE.replace(old, new)


def refusal(text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        parse_device(text, name="toy.toml")
    assert caught.value.code == "device-profile"
    return caught.value


def test_a_profile_is_read_with_its_units_and_sources():
    toy = parse_device(PROFILE)
    (core,) = toy.processors
    assert core.peak["fp16"].basic == 4e12
    assert core.launch.basic == pytest.approx(2e-6)
    assert toy.tier("dram").capacity.basic == 8 * 2**30
    assert toy.source_of(core.launch).title == "Toy data sheet"
    assert toy.source_of(core.launch).date == "2024-05"
    assert set(toy.efficiency) == set(WORK_KINDS)


@pytest.mark.parametrize(
    ("field", "old"),
    [
        ("processor.0.peak.fp16.unit", 'value = 4, unit = "Top/s"'),
        ("processor.0.launch", 'launch = { value = 2, unit = "us", source = "sheet" }\n'),
        ("memory.0.latency", 'latency = { value = 100, unit = "ns", source = "sheet" }\n'),
        ("name", 'name = "Toy board"\n'),
        ("sources.sheet.date", 'date = "2024-05"\n'),
    ],
)
def test_a_missing_field_is_named_with_file_and_line(field: str, old: str):
    text = changed(old, "value = 4" if "Top/s" in old else "")
    error = refusal(text)
    assert f"{field} is missing" in error.message
    assert error.site is not None and error.site.startswith("toy.toml:" if "." in field else "toy")


@pytest.mark.parametrize("value", ["-4", "0", "-0.5"])
def test_a_number_that_is_not_positive_is_named_with_its_line(value: str):
    error = refusal(changed("value = 4,", f"value = {value},"))
    assert "processor.0.peak.fp16.value" in error.message
    assert "positive" in error.message
    assert error.site == f"toy.toml:{line_of('peak.fp16')}"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("managed =", "manged =", ["memory.0.manged", "did you mean 'managed'?"]),
        ("peak.fp16", "peak.fp17", ["processor.0.peak.fp17", "fp16"]),
        ('kind = "npu"', 'kind = "toaster"', ["kind", "toaster", "gpu"]),
        ('unit = "us"', 'unit = "GB"', ["processor.0.launch.unit", "'GB'"]),
        ('"us", source = "sheet"', '"us", source = "guess"', ["source", "'guess'", "sheet"]),
        ("value = 50,", "value = 50e9,", ["memory.0.bandwidth", "no device has"]),
        ("value = 50,", 'value = "50",', ["memory.0.bandwidth.value", "number"]),
        ("value = 50,", "value = true,", ["memory.0.bandwidth.value", "number"]),
        ('memory = "dram"', 'memory = "flash"', ["processor.0.memory", "dram"]),
        ('class = "accelerator"', 'class = "fridge"', ["class", "fridge"]),
        ('class = "accelerator"\n', "", ["efficiency lacks", "linear"]),
        ("schema = 1", "schema = 9", ["schema", "9"]),
        ('date = "2024-05"', 'date = "May"', ["sources.sheet.date", "2024-05"]),
        ("managed =", "read_only = true\nmanaged =", ["memory.0.read_only"]),
        ("launch = {", 'runs = ["ironing"]\nlaunch = {', ["runs", "ironing", "linear"]),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(old: str, new: str, words: list[str]):
    error = refusal(changed(old, new))
    for word in words:
        assert word in f"{error.message} {error.hint}"
    assert error.site is not None and error.site.startswith("toy.toml")


def test_two_parts_of_one_name_are_refused():
    text = PROFILE + PROFILE[PROFILE.index("[[memory]]") :]
    assert "memory.1.name 'dram' is there twice" in refusal(text).message


def test_hostile_toml_is_bounded():
    with pytest.raises(LimitError):
        parse_device("a" * 3_000_000)
    with pytest.raises(LimitError):
        parse_device("a = " + "[" * 5000)


def test_every_profile_asked_for_is_there():
    assert {one.id for one in SHIPPED} >= set(REQUIRED)


@pytest.mark.parametrize("profile", SHIPPED, ids=lambda one: one.id)
def test_a_shipped_profile_is_complete(profile: DeviceProfile):
    assert profile.summary and profile.processors and profile.memory
    assert set(profile.efficiency) == set(WORK_KINDS)
    for processor in profile.processors:
        assert processor.energy.keys() >= processor.peak.keys() - {"fp64"}
    for tier in profile.memory:
        assert tier.energy is not None
    assert "idle" in profile.power
    # Every source named is used, and every number's source is dated.
    used = {quantity.source for quantity in _quantities(profile)}
    own = {name for name in profile.sources if not name.startswith("class-")}
    assert own <= used
    assert all(re.match(r"20\d\d", profile.sources[name].date) for name in used)


@pytest.mark.parametrize("profile", SHIPPED, ids=lambda one: one.id)
def test_a_profile_survives_being_written_and_read(profile: DeviceProfile, tmp_path: Path):
    path = tmp_path / "copy.toml"
    path.write_text(device_toml(profile))
    copy = read_device(path)
    for field in ("id", "name", "kind", "processors", "memory", "links", "efficiency", "sources",
                  "power", "sustained", "aliases", "backends"):  # fmt: skip
        assert getattr(copy, field) == getattr(profile, field), field


def test_memory_tiers_come_fastest_first():
    for profile in SHIPPED:
        if profile.kind == "pim":
            continue  # its banks outrun what its small processor reads through
        caches = [tier for tier in profile.memory if not tier.read_only]
        speeds = [tier.bandwidth.basic for tier in caches]
        assert speeds == sorted(speeds, reverse=True), profile.id


def test_devices_are_found_by_id_alias_and_path(tmp_path: Path):
    assert find_device("a100").id == find_device("a100-80g").id == "a100"
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE)
    assert find_device(path).id == find_device(str(path)).id == "toy"


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(UsageError) as caught:
        find_device("a1000")
    assert caught.value.code == "unknown-device"
    assert "did you mean 'a100'?" in (caught.value.hint or "")
    with pytest.raises(UsageError) as caught:
        find_device("no/such.toml")
    assert caught.value.code == "missing-file"


def test_units_are_read_in_basic_units():
    assert Quantity(2, "GiB", "bytes", "x").basic == 2**31
    assert Quantity(2, "GB", "bytes", "x").basic == 2e9
    assert Quantity(5, "pJ/B", "energy per byte", "x").basic == pytest.approx(5e-12)
    assert Quantity(50, "%", "ratio", "x").basic == 0.5
    assert all(1.0 in units.values() for units in UNITS.values())


def _quantities(profile: DeviceProfile) -> list[Quantity]:
    found: list[Quantity] = []
    for owner in (*profile.processors, *profile.memory, *profile.links):
        for value in vars(owner).values():
            if isinstance(value, Quantity):
                found.append(value)
            elif isinstance(value, dict):
                found.extend(v for v in value.values() if isinstance(v, Quantity))
    for efficiency in profile.efficiency.values():
        found.extend(vars(efficiency).values())
    found.extend(profile.power.values())
    if profile.sustained is not None:
        found.append(profile.sustained)
    return found
