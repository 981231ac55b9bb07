"""Every model of the zoo loses a quarter of every group and still runs at two batch sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mopt.coupling import find_coupling, shrink
from mopt.frontend import capture
from mopt.inputs import resized
from mopt.models import load, names
from tests.pruned import some_removed

# The same layers as other models, at sizes that take long to build.
LARGE = ("bert-base", "gpt-12x768")
# Captured with dynamic sizes, which take seconds, and run at two of them.
TWO_SIZES = ("digits-cnn", "mobilenet-v2", "pydoc-gpt", "unet2d")


@pytest.mark.parametrize("name", [one.name for one in names() if one.name not in LARGE])
def test_a_quarter_of_every_group_goes(name: str) -> None:
    zoo = load(name)
    shapes = zoo.dynamic_shapes() if name in TWO_SIZES and zoo.dynamic_shapes else None
    result = capture(zoo.build(), zoo.example_inputs(), shapes)
    found = find_coupling(result)
    assert found.groups
    removed = some_removed(found, 0.25)
    predicted, whole = found.flops(removed), found.flops(np.zeros_like(removed))
    assert 0.5 < predicted / whole < 0.93
    shrink(result, found, removed)
    result.verify()
    assert result.flops() == pytest.approx(predicted, rel=1e-6)
    for batch in (1, 2) if name in TWO_SIZES else ():
        given = resized(result, batch)
        assert given is not None
        outputs = result.run_flat(*given[0], **given[1])
        assert all(torch.isfinite(one).all() for one in outputs)
        assert outputs[0].shape[0] == batch
