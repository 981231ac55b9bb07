"""Drift is what it says, also at the edges; metrics are read in every form a user may give."""

from __future__ import annotations

import math

import pytest
import torch

from mopt.errors import InputError
from mopt.quality import DriftMeter, Metric, drift, evaluate_metric


def test_equal_outputs_have_no_drift() -> None:
    found = drift([torch.tensor([1.0, -math.inf])], [torch.tensor([1.0, -math.inf])])
    assert found.max_abs == 0 and math.isinf(found.sqnr_db) and found.cosine == 1.0
    assert found.as_json()["sqnr_db"] is None


def test_known_values() -> None:
    found = drift([torch.tensor([[3.0, 4.0]])], [torch.tensor([[3.0, 4.5]])])
    assert found.max_abs == pytest.approx(0.5)
    assert found.relative == pytest.approx(0.125)
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))
    assert found.agreement == 1.0


def test_batches_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    reference, other = torch.randn(8, 5), torch.randn(8, 5)
    meter = DriftMeter()
    for start in range(0, 8, 2):
        meter.add([reference[start : start + 2]], [other[start : start + 2]])
    whole = drift([reference], [other])
    assert meter.result().sqnr_db == pytest.approx(whole.sqnr_db)
    assert meter.result().cosine == pytest.approx(whole.cosine)
    assert meter.result().agreement == whole.agreement


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match="output has shape"):
        drift([torch.zeros(2)], [torch.zeros(3)])


def test_metric_forms() -> None:
    def accuracy(run: object) -> float:
        return 0.5

    assert evaluate_metric(accuracy, None) == Metric("accuracy", 0.5, True)  # type: ignore[arg-type]
    mapping = {"metric": "bits per byte", "value": 2.0, "higher_is_better": False}
    assert evaluate_metric(lambda run: mapping, len) == Metric("bits per byte", 2.0, False)


@pytest.mark.parametrize("result", [None, "good", {"metric": "x"}, math.nan])
def test_results_that_are_no_number(result: object) -> None:
    with pytest.raises(InputError) as caught:
        evaluate_metric(lambda run: result, len)
    assert caught.value.code == "bad-metric"


def test_loss_follows_the_direction() -> None:
    assert Metric("a", 0.9, True).loss_against(Metric("a", 1.0, True)) == pytest.approx(0.1)
    assert Metric("b", 2.2, False).loss_against(Metric("b", 2.0, False)) == pytest.approx(0.1)
