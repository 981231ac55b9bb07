"""Estimates from data sheets: what they must say of any device."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopt.cost import Work
from mopt.cost_models.roofline import Roofline
from mopt.device import find_device, list_devices
from mopt.errors import UsageError

DEVICES = [one.id for one in list_devices()]
SIZES = st.integers(3, 12).map(lambda power: 2**power)


def milliseconds(device: str, shape: tuple[int, int], name: str = "fp32", rows: int = 1) -> float:
    return Roofline(find_device(device)).layer_cost(
        "linear", shape, name, rows=rows
    ).milliseconds  # fmt: skip


@settings(max_examples=30)
@given(device=st.sampled_from(DEVICES), outputs=SIZES, inputs=SIZES, rows=st.integers(1, 512))
def test_more_work_never_takes_less_time(device: str, outputs: int, inputs: int, rows: int) -> None:
    try:
        once = milliseconds(device, (outputs, inputs), rows=rows)
        wider = milliseconds(device, (2 * outputs, inputs), rows=rows)
        longer = milliseconds(device, (outputs, inputs), rows=rows + 64)
    except UsageError as error:
        assert error.code == "no-processor"  # banks of memory take one vector at a time
        return
    assert 0 < once <= wider * (1 + 1e-9)
    assert once <= longer * (1 + 1e-9)


@pytest.mark.parametrize("device", ["a100", "h100", "cpu-avx2"])
def test_one_row_is_bound_by_the_memory_and_many_by_arithmetic(device: str) -> None:
    model = Roofline(find_device(device))
    single = model.layer_cost("linear", (4096, 4096), "fp16", rows=1)
    many = model.layer_cost("linear", (4096, 4096), "fp16", rows=4096)
    assert single.bound == "memory"
    assert many.bound == "compute"
    profile = find_device(device)
    streamed = 2 * 4096**2 / profile.tier(profile.processors[0].memory).bandwidth.basic
    assert single.milliseconds * 1e-3 > streamed


def test_fewer_bits_are_read_faster_where_memory_binds() -> None:
    times = [milliseconds("h100", (8192, 8192), name) for name in ("fp32", "fp16", "int4-g128")]
    assert times == sorted(times, reverse=True)
    assert times[0] > 4 * times[2]


def test_energy_grows_with_the_work() -> None:
    model = Roofline(find_device("cortex-m7"))
    small, large = (model.layer_cost("linear", (size, 64)).energy_mj for size in (64, 256))
    assert small is not None and large is not None
    assert 0 < small < large


def test_two_processors_share_the_work_by_operations_per_byte() -> None:
    model = Roofline(find_device("duplex"))

    def work(rows: int) -> Work:
        weights, values = 2.0 * 4096**2, 4.0 * rows * 4096
        return Work("linear", 2.0 * rows * 4096**2, weights, values, "fp16", rows=rows)

    one, many = model.placement(work(1)), model.placement(work(2048))
    assert one.processor != many.processor
    assert one.crossover is not None
    assert one.ops_per_byte < one.crossover < many.ops_per_byte


def test_an_unknown_device_is_never_surer_than_a_quarter() -> None:
    for device in DEVICES:
        cost = Roofline(find_device(device)).layer_cost("linear", (64, 64))
        assert cost.level == "data-sheet"
        assert cost.uncertainty >= 0.25
        assert cost.low < cost.milliseconds < cost.high
        assert math.isfinite(cost.milliseconds)
