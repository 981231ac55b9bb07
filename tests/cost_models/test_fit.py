"""Fits to timings: they find what made the timings, and know how sure they are."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from mopt.cost_models.families import families
from mopt.cost_models.fit import Predictor, fit_family
from mopt.cost_models.layer_work import layer_works
from mopt.cost_models.probe import plan_probes
from mopt.cost_models.probe_models import build_probe, builders
from mopt.cost_models.roofline import Roofline
from mopt.device import find_device
from mopt.device_calibration import Point, Rates
from mopt.errors import UsageError

TRUE = Rates(4e10, 8e9, 2e10, 2e10, 1e9, 2e-6, 2.0)
GUESS = Rates(1e11, 2e10, 5e10, 5e10, 1e9, 1e-6, 4.0)


def points(count: int, noise: float, seed: int = 0) -> list[Point]:
    rng = random.Random(seed)
    family = families()["linear.fp32"]
    found = []
    for probe in plan_probes(count, Roofline(find_device("cpu-avx2")), ["linear.fp32"]):
        amount = family.amount(probe.dims)
        seconds = 2e-6 + math.hypot(
            amount.flops / TRUE.operations, amount.weight_bytes / TRUE.weights
        )
        found.append(Point(probe.dims, 1e6 * seconds * math.exp(rng.gauss(0, noise)), noise))
    return found


def test_finds_a_roofline_from_few_timings() -> None:
    fit, errors = fit_family(families()["linear.fp32"], points(40, 0.02), GUESS)
    assert float(np.median(errors)) < 0.10
    assert fit.error_90 < 0.35
    predictor = Predictor(families()["linear.fp32"], fit)
    seconds, unsure = predictor.seconds((64, 512, 512))
    expected = 2e-6 + math.hypot(2 * 64 * 512**2 / 4e10, 4 * 512**2 / 8e9)
    assert seconds == pytest.approx(expected, rel=0.25)
    assert 0 < unsure < 0.5


def test_is_less_sure_where_nothing_was_timed() -> None:
    fit, _ = fit_family(families()["linear.fp32"], points(30, 0.05), GUESS)
    predictor = Predictor(families()["linear.fp32"], fit)
    timed = fit.points[0].dims
    assert predictor.seconds(timed)[1] < predictor.seconds((1 << 14, 1 << 14, 1 << 14))[1]


def test_every_family_has_a_model_to_time_it_with() -> None:
    plan = plan_probes(300, Roofline(find_device("cpu-avx2")))
    assert {probe.family for probe in plan} == set(families()) <= set(builders())
    smallest = {}
    for probe in plan:
        size = math.prod(probe.dims)
        if size < smallest.get(probe.family, (math.inf, probe))[0]:
            smallest[probe.family] = (size, probe)
    for _, probe in smallest.values():
        model, inputs, taps = build_probe(probe.family, probe.dims, 2)
        assert model and taps >= 0 and all(array.size for array in inputs.values())


@pytest.mark.parametrize(
    ("kind", "shape", "name", "families_"),
    [
        ("linear", (64, 32), "fp32", ["linear.fp32"]),
        ("linear", (64, 32), "int8-dynamic", ["linear.int8-dynamic"]),
        ("linear", (64, 32), "int4-g32", ["linear.int4-blocks"]),
        ("linear", (64, 32), "int8-qdq",
         ["linear.int8-shared", "quantize.linear"]),
        ("convolution", (8, 8, 3, 3), "fp32", ["convolution.fp32"]),
        ("embedding", (100, 16), "fp32", ["embedding.fp32"]),
    ],
)  # fmt: skip
def test_what_a_layer_becomes(
    kind: str, shape: tuple[int, ...], name: str, families_: list[str]
) -> None:
    works = layer_works(kind, shape, name, rows=4, geometry={"output": (2, 2)})
    assert [work.variant for work in works] == families_
    assert all(work.bytes > 0 for work in works)


def test_formats_without_a_kernel_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        layer_works("convolution", (8, 8, 3, 3), "int4-g32", rows=4)
    assert caught.value.code == "no-kernel"
