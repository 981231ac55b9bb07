"""Values moved out until backward: the same gradients, planned peaks, places used again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.allocations import record_allocations
from mopt.errors import UsageError
from mopt.training import TrainingOptions
from tests.backends.test_dynamo import compiled, plans, step

FAST: dict[str, Any] = {"offload": "auto", "link_bandwidth": "20GB/s"}


class Wide(nn.Module):
    """Values of 512 KiB that are dear to make again; a transposed view of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.silu(layer(x))
        return (x @ x.T).tanh()


@pytest.fixture(scope="module")
def wide() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Wide(), torch.randn(512, 256)


def test_gradients_are_bit_for_bit_and_peaks_as_planned(wide: tuple[nn.Module, Tensor]) -> None:
    model, x = wide
    reference = copy.deepcopy(model)
    run, options = compiled(model, memory_budget="60%", **FAST)
    expected, found = step(reference, reference, x), step(run, model, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    (done,) = plans(options)
    assert done.plan.settled
    assert sum(row.offloaded_bytes for row in done.layers) >= 512 << 10
    model.zero_grad()
    with record_allocations() as seen:
        run(x).sum().backward()
    planned = done.plan.figures.peak - done.kinds["weights and inputs"]
    assert seen.total.peak <= planned + 64
    # Two forwards at once do not share their places.
    losses = run(x).sum(), run(x + 1).sum()
    weights = model.layers[0].weight, reference.layers[0].weight
    for loss, plain in zip(losses, (reference(x).sum(), reference(x + 1).sum()), strict=True):
        found, expected = (
            torch.autograd.grad(v, w)[0] for v, w in zip((loss, plain), weights, strict=True)
        )
        assert torch.equal(found, expected)


def test_a_slow_link_is_left_alone(wide: tuple[nn.Module, Tensor]) -> None:
    model, x = wide
    run, options = compiled(model, memory_budget="60%", offload="auto", link_bandwidth="1MB/s")
    run(x).sum().backward()
    (done,) = plans(options)
    assert not done.plan.settled
    assert done.plan.repeats()


def test_offload_is_for_eager_code() -> None:
    with pytest.raises(UsageError, match="eager"):
        TrainingOptions.of({"offload": "auto", "codegen": "inductor"})
