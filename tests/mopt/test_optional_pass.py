"""A pass that may be left out."""

from __future__ import annotations

import pytest

from mopt.errors import PassError
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny


def test_a_pass_without_its_data_is_left_out_only_if_it_is_optional() -> None:
    program = tiny.mlp().capture()
    with pytest.raises(PassError, match="calibration"):
        Pipeline([make_pass("smooth-activations", {})]).run(program)
    result = Pipeline([make_pass("smooth-activations", {"optional": True})]).run(program)
    (step,) = result.steps
    assert not step.changed
    assert [(skip.site, "calibration" in skip.reason) for skip in step.skipped] == [("model", True)]
    assert result.fingerprint() == program.fingerprint()
