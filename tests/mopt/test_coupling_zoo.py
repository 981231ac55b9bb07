"""Every model of the zoo loses a quarter of every group and still runs at two batch sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from mopt.coupling import find_coupling, shrink
from mopt.frontend import capture
from mopt.inputs import resized
from mopt.models import load, names
from mopt.models._bert import Encoder
from mopt.models.gpt_12x768 import Gpt
from mopt.models.vit import VisionTransformer
from mopt.program import Program
from tests.case import assert_near
from tests.pruned import some_removed

# The same classes with fewer and narrower layers: at their own sizes they take long to build.
SMALLER = {
    "bert-base": lambda: Encoder(2, 96, 4),
    "gpt-12x768": lambda: Gpt(2, 96, 4),
    "vit": lambda: VisionTransformer(3, 96, 4),
}
# Torch writes an LSTM out step by step while it captures one.
SHORTER = {"gpt-12x768": 32, "lstm": 6}


def first_output(program: Program, batch: int) -> Tensor:
    given = resized(program, batch)
    assert given is not None
    return program.run_flat(*given[0], **given[1])[0]


@pytest.mark.parametrize("name", [one.name for one in names()])
def test_a_quarter_of_every_group_goes(name: str) -> None:
    zoo = load(name)
    module: nn.Module = SMALLER[name]().eval() if name in SMALLER else zoo.build()
    inputs: tuple[Any, ...] = zoo.example_inputs()
    if name in SHORTER:
        inputs = tuple(one[:, : SHORTER[name]] for one in inputs)
    batch = Dim("batch", max=64)
    result = capture(module, inputs, tuple({0: batch} for _ in inputs))
    found = find_coupling(result)
    assert found.groups
    removed = some_removed(found, 0.25)
    predicted, whole = found.flops(removed), found.flops(np.zeros_like(removed))
    # The head over all words is most of a model made narrow.
    assert 0.5 < predicted / whole < (0.995 if name in SMALLER else 0.93)
    shrink(result, found, removed)
    result.verify()
    assert result.flops() == pytest.approx(predicted, rel=1e-6)
    alone, both = first_output(result, 1), first_output(result, 2)
    assert torch.isfinite(both).all()
    assert len(alone) == 1 and len(both) == 2
    # No row depends on the others, up to the order of sums.
    assert_near([alone[0]], [both[0]], tolerance=1e-4, what=name)
