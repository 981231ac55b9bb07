"""recover-quality."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.pass_base import PassContext
from mopt.passes.prune._distill import Adapter, distance
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.prune.costs import BlockModel
from tests.passes.quantize.calibrated import batches_for
from tests.tiny import normal

SHORT = {"steps": 12, "minutes": 5.0}
PRUNE = ("prune-channels", {"ratio": 0.3, "multiple": 1, "refit": False})


def pruned(made: Sample, *passes: tuple[str, dict[str, Any]]) -> tuple[Program, dict[str, Any]]:
    """A program after lossy passes, and the context that tells what it was."""
    program = made.capture()
    context = {"unrounded": program, "cost_model": BlockModel(1)}
    ctx = PassContext(calibration=Calibration(batches_for(made, 9), program), **context)
    return Pipeline([make_pass(*one) for one in passes or [PRUNE]]).run(program, ctx), context


def case(name: str, made: Sample, changed: bool, options: dict[str, Any], *passes: Any,
         count: int = 9, **more: Any) -> Case:  # fmt: skip
    result, context = pruned(made, *passes)
    data = Calibration(batches_for(made, count), result)
    return Case(name, result, changed, SHORT | options, calibration=lambda: data,
                context=context, **more)  # fmt: skip


# Twelve small steps move outputs by a few tenths at most.
CASES = [
    case("mlp", tiny.mlp(), True, {}, tolerance=0.9),
    case("decoder-with-low-rank-changes", tiny.decoder(), True, {"rank": 2}, tolerance=0.9),
    case("one-batch", tiny.mlp(), False, {}, count=1, skipped="two batches"),
    case("rounded", tiny.mlp(), False, {}, ("quantize-weights", {"min_size": 0, "group": 16}),
         skipped="train before that"),
    Case("nothing-lost", tiny.mlp(), False, SHORT,
         calibration=lambda: Calibration(batches_for(tiny.mlp(), 9), tiny.mlp().capture()),
         skipped="nothing was lost"),
]  # fmt: skip


def recover(result: Program, context: dict[str, Any], made: Sample, **options: Any) -> Program:
    ctx = PassContext(calibration=Calibration(batches_for(made, 9), result), **context)
    return Pipeline([make_pass("recover-quality", SHORT | options)]).run(result, ctx)


@pytest.mark.parametrize("rank", [0, 3])
def test_training_brings_the_outputs_nearer_and_repeats_by_seed(rank: int) -> None:
    made = tiny.mlp()
    result, context = pruned(made)
    one = recover(result, context, made, rank=rank, learning_rate=0.01)
    found = one.steps[-1].stats["distance"]
    assert found["after"] < 0.9 * found["before"]
    assert one.steps[-1].stats["steps"] == 12
    again = recover(result, context, made, rank=rank, learning_rate=0.01)
    assert one.fingerprint() == again.fingerprint()


def test_zeros_of_pruned_weights_stay() -> None:
    made = tiny.mlp()
    sparse, context = pruned(made, ("prune-weights", {"min_size": 0, "layers": "0"}))
    for rank in (0, 2):
        result = recover(sparse, context, made, rank=rank, learning_rate=0.01)
        assert result.steps[-1].changed
        first = next(t for n, t in result.weights().items() if n.startswith("0.weight"))
        before = next(t for n, t in sparse.weights().items() if n.startswith("0.weight"))
        assert torch.equal(first == 0, before == 0)
        assert not torch.equal(first, before)


def test_training_that_makes_it_worse_is_dropped_and_time_ends_it() -> None:
    made = tiny.mlp()
    result, context = pruned(made)
    worse = recover(result, context, made, learning_rate=1e6)
    assert not worse.steps[-1].changed
    assert "did not bring the outputs nearer" in worse.steps[-1].skipped[0].reason
    short = recover(result, context, made, steps=100_000, minutes=0.002)
    assert short.steps[-1].stats["steps"] < 100_000


def test_distance_and_adapters() -> None:
    logits, other = normal(5, 7), normal(5, 7, seed=1)
    assert float(distance([logits], [logits], 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(distance([logits + 3.0], [logits], 1.0)) == pytest.approx(0, abs=1e-6)
    # T^2 keeps the size of the gradients: at high temperatures the loss tends to a constant.
    warm, warmer = (float(distance([other], [logits], t)) for t in (50.0, 100.0))
    assert warm == pytest.approx(warmer, rel=0.05)
    adapter = Adapter.of(normal(6, 8), 2, torch.Generator().manual_seed(0))
    assert torch.equal(adapter.value(), normal(6, 8))


def test_it_needs_data() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("recover-quality", {})]).run(tiny.mlp().capture())
