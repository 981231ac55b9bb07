"""Tiny models of transformers without a quarter of every group equal those with it zeroed."""

from __future__ import annotations

import pytest

from mopt.frontend import capture
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests.case import grown_inputs
from tests.mopt.test_capture_transformers import BATCH, MODELS, build
from tests.pruned import check_pruned


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_quarter_of_every_group_goes_at_two_batch_sizes(name: str) -> None:
    model, inputs = build(name)
    example = inputs(2, 0)
    program = capture(model, example, {key: {0: BATCH} for key in example})
    program = Pipeline([make_pass("use-linear", {})]).run(program)
    result = check_pruned(program, 0.25)
    assert grown_inputs(result) is not None  # check_pruned ran it at both
    assert result.parameter_count() < program.parameter_count()
