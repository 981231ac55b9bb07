"""Tiny models of transformers without a quarter of every group equal those with it zeroed."""

from __future__ import annotations

import pytest

from mopt.frontend import capture
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests.mopt.test_capture_transformers import MODELS, build, dynamic
from tests.pruned import check_pruned

# Symbolic sizes cost seconds per model; these have every kind of shape the others have.
TWO_SIZES = ("bert", "gpt2", "llama")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_quarter_of_every_group_goes(name: str) -> None:
    model, inputs = build(name)
    example = inputs(2, 0)
    program = capture(model, example, dynamic(example) if name in TWO_SIZES else None)
    program = Pipeline([make_pass("use-linear", {})]).run(program)
    result = check_pruned(program, 0.25)
    assert result.parameter_count() < program.parameter_count()
