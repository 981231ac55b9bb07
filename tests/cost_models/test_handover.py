"""What operators take in a model beyond what they take alone; the timings are made up here."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from mopt.cost import Cost, Work
from mopt.cost_models.executed import ExecutedModel, ExecutedNode, Value
from mopt.cost_models.families import families
from mopt.cost_models.handover import Piece, fit_handover, plan_pieces
from mopt.cost_models.model_cost import executed_cost
from mopt.cost_models.probe import Probe
from mopt.device_calibration import CallOverhead, Handover


def piece(
    activations: float, weights: float, count: int = 4, kind: str = "linear", form: str = "fp32"
) -> Piece:
    work = Work(kind, 1e6, weights, activations, form, variant=f"{kind}.{form}", shape=(1, 1, 1))
    return Piece(Probe("chain.encoder", (0, 1, 1, 1), 1), (work,) * count)


PIECES = [
    piece(a * 1e5, w * 1e5, n, kind, form)
    for kind, form in (("linear", "fp32"), ("linear", "int8"), ("convolution", "fp32"))
    for a in (1, 3, 9) for w in (0, 2, 8) for n in (2, 6)
]  # fmt: skip


def alone(work: Work) -> float:
    return 50.0


def times(truth: Handover) -> list[float]:
    return [
        one.alone(alone) + sum(1e3 * truth.milliseconds(work) for work in one.works)
        for one in PIECES
    ]


@pytest.mark.parametrize(
    "truth",
    [
        Handover(2e-5, 3e-5, 1e-5, 4e-6, 1.5), Handover(3e-5), Handover(code_us=2e-5),
        Handover(convolution_us=2e-5), Handover(operator_us=4.0), Handover(),
    ],
)  # fmt: skip
def test_finds_what_made_the_times(truth: Handover) -> None:
    found = fit_handover(PIECES, times(truth), alone)
    assert astuple(found) == pytest.approx(astuple(truth), rel=1e-3, abs=1e-8)


def test_is_never_negative_and_stands_a_disturbed_timing() -> None:
    truth = Handover(2e-5, 1e-5, operator_us=1.5)
    measured = times(truth)
    measured[3] *= 3
    assert fit_handover(PIECES, measured, alone).activation_us == pytest.approx(2e-5, rel=0.1)
    faster = [0.8 * one.alone(alone) for one in PIECES]
    assert fit_handover(PIECES, faster, alone) == Handover()


def test_what_waited_for_a_processor_counts_less() -> None:
    truth = Handover(2e-5, 1e-5, operator_us=1.5)
    measured = [t * (1.04 if i % 3 == 0 else 1.0) for i, t in enumerate(times(truth))]
    trust = [0.01 if i % 3 == 0 else 1.0 for i in range(len(PIECES))]
    off = [
        abs(fit_handover(PIECES, measured, alone, weights).operator_us - 1.5)
        for weights in (None, trust)
    ]
    assert off[1] < off[0] / 2


def test_the_steps_of_a_recurrent_layer_hand_nothing_over() -> None:
    """Its weights are counted once a step: with those, an LSTM was estimated at twice its time."""
    work = Work("recurrent", 1e6, 64 * 2e6, 1e6, variant="recurrent.lstm", shape=(64, 4, 8, 8, 1))
    assert Handover(1e-5, 3e-5, 1e-5, 1e-5, 0.5).milliseconds(work) == pytest.approx(0.5e-3)


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
