"""The cost model that times the operators it is asked about; the timings are made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopt.cache import Cache
from mopt.cost import LayerRequest
from mopt.cost_models import timed
from mopt.cost_models.host import class_profile
from mopt.cost_models.probe import Probe, ProbeRun, Sample
from mopt.cost_models.probe_models import build_probe
from mopt.cost_models.roofline import Roofline
from mopt.cost_models.select import cost_model
from mopt.device import find_device
from mopt.device_calibration import CallOverhead
from mopt.errors import LimitError

LINEAR = LayerRequest("linear", (256, 128), "fp32", rows=16)


class Timer:
    """Stands in for ``run_probes``: every operator takes ``us``, and calls are counted."""

    def __init__(self, us: float = 40.0, *, quiet: bool = True) -> None:
        self.us, self.quiet = us, quiet
        self.runs: list[list[Probe]] = []

    def __call__(self, probes: list[Probe], **more: object) -> ProbeRun:
        self.runs.append(list(probes))
        samples = [Sample(p.family, p.dims, self.us, 0.02, 3, self.quiet) for p in probes]
        return ProbeRun(tuple(samples), 0.0, 1.0, 0.5, CallOverhead(6.0, 1.0, 1e4), 1.0)


def model(cache: Cache | None = None) -> timed.TimedModel:
    return timed.TimedModel(Roofline(class_profile()), cache)


def ask(costs: timed.TimedModel, weight_format: str = "fp32") -> float:
    found = costs.layer_cost("linear", (256, 128), weight_format, rows=16)
    return found.milliseconds


def test_a_layer_costs_what_its_operators_took(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer()
    monkeypatch.setattr(timed, "run_probes", timer)
    costs = model()
    costs.prepare([LINEAR, LayerRequest("linear", (256, 128), "int8-qdq", rows=16)])
    assert ask(costs) == pytest.approx(0.040)
    assert costs.layer_cost("linear", (256, 128), rows=16).level == "measured"
    # The product in 8 bits, and rounding its input.
    assert ask(costs, "int8-qdq") == pytest.approx(0.080)
    costs.prepare([LINEAR])
    assert len(timer.runs) == 1


def test_what_was_not_timed_is_estimated() -> None:
    costs = model()
    found = costs.layer_cost("linear", (256, 128), rows=16)
    assert found.level == "data-sheet"
    assert found.milliseconds == pytest.approx(
        Roofline(class_profile()).layer_cost("linear", (256, 128), rows=16).milliseconds
    )


def test_a_machine_that_cannot_be_timed_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **more: object) -> ProbeRun:
        raise LimitError("no time", code="child-timeout")

    monkeypatch.setattr(timed, "run_probes", fails)
    costs = model()
    costs.prepare([LINEAR, LayerRequest("linear", (256, 128), "codebook-2")])
    assert costs.layer_cost("linear", (256, 128), rows=16).level == "data-sheet"


def test_timings_are_kept_if_nothing_disturbed_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timer = Timer(40.0)
    monkeypatch.setattr(timed, "run_probes", timer)
    model(Cache(tmp_path / "quiet")).prepare([LINEAR])
    again = model(Cache(tmp_path / "quiet"))
    again.prepare([LINEAR])
    assert len(timer.runs) == 1
    assert ask(again) == pytest.approx(0.040)
    disturbed = Timer(90.0, quiet=False)
    monkeypatch.setattr(timed, "run_probes", disturbed)
    model(Cache(tmp_path / "busy")).prepare([LINEAR])
    model(Cache(tmp_path / "busy")).prepare([LINEAR])
    assert len(disturbed.runs) == 2


def test_only_this_machine_is_timed() -> None:
    assert isinstance(cost_model(class_profile(), timed=True), timed.TimedModel)
    assert isinstance(cost_model(class_profile()), Roofline)
    assert isinstance(cost_model(find_device("h100"), timed=True), Roofline)


def test_handing_over_is_calibrated_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, inputs, _ = build_probe("linear.fp32", (8, 64, 64), 2)
    (tmp_path / "model.onnx").write_bytes(built)
    monkeypatch.setattr(timed, "_BRIEF_PIECES", 1)
    cache = Cache(tmp_path / "cache")

    def pieces_timed() -> int:
        timer = Timer()
        monkeypatch.setattr(timed, "run_probes", timer)
        model(cache).model_cost(tmp_path / "model.onnx", inputs)
        return sum(p.family.startswith("chain.") for run in timer.runs for p in run)

    assert pieces_timed() >= 7
    assert pieces_timed() == 0
