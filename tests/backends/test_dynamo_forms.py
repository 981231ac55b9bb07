"""The mopt backend with smaller forms of saved values, exact and lossy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.allocations import record_allocations
from tests.backends.test_dynamo import compiled, plans, step


class Masks(nn.Module):
    """Dropout again and again: backward reads the masks and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for _ in range(16):
            x = F.dropout(x, 0.1, self.training)
        return x


class Places(nn.Module):
    """Max pooling again and again: backward reads where each largest value was."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for _ in range(6):
            x = F.max_pool2d(x, 3, 1, 1)
        return x


@pytest.mark.parametrize(
    ("kind", "shape", "form", "budget"),
    [(Masks, (256, 64), "bits", "70%"), (Places, (2, 3, 32, 32), "int16", "45%")],
)
def test_masks_and_places_are_kept_small_and_exactly(
    kind: type[nn.Module], shape: tuple[int, ...], form: str, budget: str
) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(shape)
    reference = copy.deepcopy(model)
    # Pooling again takes several times as long as narrowing its places, which shapes do not tell.
    costs = "measured" if form == "int16" else "estimated"
    run, options = compiled(model, memory_budget=budget, costs=costs)
    expected, found = step(reference, reference, x), step(run, model, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    (done,) = plans(options)
    forms = {c.form for c in done.problem.forward if c.form and set(c.makes) & done.plan.saved}
    assert forms == {form}
    assert sum(row.squeezed_bytes for row in done.layers) > 0
    model.zero_grad()
    with record_allocations() as seen:
        run(x).sum().backward()
    # The operators' own pieces are counted only where calls are measured.
    assert seen.total.peak <= done.plan.figures.peak - done.kinds["weights and inputs"] + x.nbytes


class Wide(nn.Module):
    """Matrix products whose results are dear to repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.silu(layer(x))
        return x


@pytest.mark.parametrize(
    ("form", "least"),
    [
        ("int8", 0.9999), ("int4", 0.97), ("fp8", 0.999), ("int8-running", 0.999),
        ("fp8-mixed", 0.999), ("derivative", 0.99),
    ],
)  # fmt: skip
def test_lossy_forms_repeat_less_and_say_how_far_gradients_are(form: str, least: float) -> None:
    torch.manual_seed(0)
    model, x = Wide(), torch.randn(2048, 64)
    for layer in model.layers:
        # Where weights are frozen, backward needs the derivatives alone.
        layer.weight.requires_grad_(form != "derivative")
    reference = copy.deepcopy(model)
    more: dict[str, Any] = {"memory_budget": "55%", "allow": "lossy", "lossy_form": form}
    run, options = compiled(model, **more)
    expected, found = step(reference, reference, x), step(run, model, x)
    assert torch.equal(expected[0], found[0]), "forward is not approximated"
    (done,) = plans(options)
    kept = {c.form for c in done.problem.forward if c.form and set(c.makes) & done.plan.saved}
    assert kept and all(name.startswith(form) for name in kept)
    flat = [torch.cat([g.flatten() for g in some[1:]]) for some in (expected, found)]
    assert F.cosine_similarity(*flat, dim=0) > least
    assert not torch.equal(*flat)


def test_stand_ins_are_read_by_nobody_else() -> None:
    torch.manual_seed(0)
    model, x = Wide(), torch.randn(512, 64)
    reference = copy.deepcopy(model)
    # Gradients of weights want the activations again, which codes of derivatives cannot give.
    more: dict[str, Any] = {"memory_budget": "42%", "allow": "lossy", "lossy_form": "derivative"}
    run, options = compiled(model, **more)
    expected, found = step(reference, reference, x), step(run, model, x)
    (done,) = plans(options)
    assert any(c.form and set(c.makes) & done.plan.saved for c in done.problem.forward)
    # The weights of the third and the fourth layer; 0.04 with activations of stand-ins.
    for place in (5, 7):
        assert (found[place] - expected[place]).norm() < 0.02 * expected[place].norm()
