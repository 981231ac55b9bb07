"""mopt.fit: a training step within a budget that equals the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mopt
from mopt.errors import BudgetNotMet, InputError
from mopt.optimizer_state import state_bytes

QUICK = {"costs": "estimated", "solver": "greedy"}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Dropout(0.2), nn.Linear(64, 64),
        nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4),
    )  # fmt: skip


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(256, 16), torch.randint(4, (256,))) for _ in range(count)]


def test_steps_equal_plain_pytorch_bit_for_bit() -> None:
    model = net()
    plain = copy.deepcopy(model)
    data = batches(5)
    ours = torch.optim.AdamW(model.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    step = mopt.fit(model, F.cross_entropy, data[0], memory_budget="70%", optimizer=ours, **QUICK)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert step.plans[0].plan.repeats()
    assert step.plans[0].kinds["other"] == 2 * sum(4 * p.numel() for p in model.parameters())
    torch.manual_seed(3)
    found = [step(*batch) for batch in data]
    torch.manual_seed(3)
    for batch, loss in zip(data, found, strict=True):
        expected = F.cross_entropy(plain(batch[0]), batch[1])
        expected.backward()
        theirs.step()
        theirs.zero_grad()
        assert torch.equal(loss, expected)
    pairs = zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_lossy_gradients_are_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.SiLU())))
    batch = torch.randn(2048, 64)
    more = {"memory_budget": "45%", "allow": "lossy", "lossy_form": "int4", **QUICK}
    step = mopt.fit(model, lambda y: y.square().mean(), (batch,), **more)
    assert step.gradient_error is not None
    assert 0 < step.gradient_error.relative < 0.2
    assert step.gradient_error.cosine > 0.98
    assert step.gradient_error.worst in dict(model.named_parameters())


def test_named_inputs_and_accumulation() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * scale

    model = Named()
    inputs = {"x": torch.randn(8, 16), "scale": torch.tensor(2.0)}
    step = mopt.fit(model, lambda y: y.square().mean(), (inputs,), **QUICK)
    step.backward(inputs)
    assert model.layer.weight.grad is not None
    once = model.layer.weight.grad.clone()
    step.backward(inputs)
    assert torch.equal(model.layer.weight.grad, 2 * once)


def test_too_little_memory_says_what_is_the_least() -> None:
    with pytest.raises(BudgetNotMet, match="least peak found"):
        mopt.fit(net(), F.cross_entropy, batches(1)[0], memory_budget="10kB", **QUICK)


def test_nothing_to_train() -> None:
    with pytest.raises(InputError, match="requires a gradient"):
        mopt.fit(net().requires_grad_(False), F.cross_entropy, batches(1)[0])


def test_state_is_known_before_and_after_the_first_step() -> None:
    model = net()
    size = sum(4 * p.numel() for p in model.parameters())
    assert state_bytes(torch.optim.SGD(model.parameters(), lr=0.1)) == 0
    adam = torch.optim.Adam(model.parameters())
    assert state_bytes(adam) == 2 * size
    model(torch.randn(8, 16)).sum().backward()
    adam.step()
    assert 2 * size <= state_bytes(adam) <= 2 * size + 100
