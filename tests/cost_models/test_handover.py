"""What operators take in a model beyond what they take alone; the timings are made up here."""

from __future__ import annotations

import pytest

from mopt.cost import Cost, Work
from mopt.cost_models.executed import ExecutedModel, ExecutedNode, Value
from mopt.cost_models.families import families
from mopt.cost_models.handover import Piece, fit_handover, plan_pieces
from mopt.cost_models.model_cost import executed_cost
from mopt.cost_models.probe import Probe
from mopt.device_calibration import CallOverhead, Handover


def piece(activations: float, weights: float, count: int = 4) -> Piece:
    work = Work("linear", 1e6, weights, activations, variant="linear.fp32", shape=(1, 1, 1))
    return Piece(Probe("chain.encoder", (0, 1, 1, 1), 1), (work,) * count)


PIECES = [piece(a * 1e5, w * 1e5, n) for a in (1, 3, 9) for w in (0, 2, 8) for n in (2, 6)]


def alone(work: Work) -> float:
    return 50.0


def times(truth: Handover) -> list[float]:
    return [
        one.alone(alone)
        + sum(1e3 * truth.milliseconds(w.activation_bytes, w.weight_bytes) for w in one.works)
        for one in PIECES
    ]


@pytest.mark.parametrize(
    "truth",
    [Handover(2e-5, 1e-5, 1.5), Handover(3e-5, 0.0, 0.0), Handover(0.0, 0.0, 4.0), Handover()],
)
def test_finds_what_made_the_times(truth: Handover) -> None:
    found = fit_handover(PIECES, times(truth), alone)
    assert found.activation_us == pytest.approx(truth.activation_us, rel=1e-3, abs=1e-9)
    assert found.weight_us == pytest.approx(truth.weight_us, rel=1e-3, abs=1e-9)
    assert found.operator_us == pytest.approx(truth.operator_us, rel=1e-3, abs=1e-4)


def test_is_never_negative_and_stands_a_disturbed_timing() -> None:
    truth = Handover(2e-5, 1e-5, 1.5)
    measured = times(truth)
    measured[3] *= 3
    assert fit_handover(PIECES, measured, alone).activation_us == pytest.approx(2e-5, rel=0.1)
    faster = [0.8 * one.alone(alone) for one in PIECES]
    assert fit_handover(PIECES, faster, alone) == Handover()


def test_too_few_pieces_say_nothing() -> None:
    assert fit_handover(PIECES[:3], times(Handover(2e-5))[:3], alone) == Handover()


def test_pieces_run_operators_that_can_be_timed_alone() -> None:
    """Every operator of every piece is in a family, else its part would count as handing over."""
    for one in plan_pieces():
        assert len(one.works) >= 3 * one.probe.copies
        unknown = [w.operator for w in one.works
                   if w.kind != "free" and w.variant not in families()]  # fmt: skip
        assert not unknown, (one.probe.family, unknown)


def test_a_model_takes_longer_than_its_operators() -> None:
    class Table:
        def cost(self, work: Work) -> Cost:
            return Cost(1.0)

    value = Value("float32", (1000,))
    node = ExecutedNode("n", "Relu", "", {}, (value,), (value,))
    model = ExecutedModel((node, node), (), (), 0.0, 0)
    found = executed_cost(Table(), model, CallOverhead(), Handover(activation_us=1e-2))
    # 4 bytes for each of 1000 values in and out, twice.
    assert found.milliseconds == pytest.approx(2 + 2 * 8000 * 1e-5)
