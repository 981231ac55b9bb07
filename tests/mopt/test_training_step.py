"""mopt.fit: a training step within a budget that equals the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mopt
from mopt.errors import BudgetNotMet, InputError, UsageError
from mopt.optimizer_state import state_bytes
from mopt.training_step import _error

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


def test_updates_at_once_are_the_same_updates_and_gradients_die() -> None:
    torch.manual_seed(0)
    # A shared weight has its gradient only when its second use is differentiated.
    shared = nn.Linear(96, 96)
    layers = [nn.Linear(16, 96), shared, nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), shared]
    model = nn.Sequential(*layers, nn.Linear(96, 4))
    frozen = model[3].bias.requires_grad_(False)
    plain, late = copy.deepcopy(model), copy.deepcopy(model)
    data = [(torch.randn(32, 16), torch.randint(4, (32,))) for _ in range(3)]

    def fitted(model: nn.Module, **more: bool) -> mopt.training_step.TrainingStep:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return mopt.fit(model, F.cross_entropy, data[0], optimizer=optimizer, **QUICK, **more)

    step, other = fitted(model, update_at_once=True), fitted(late)
    assert torch.equal(model[1].weight, plain[1].weight), "planning updates nothing"
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for batch in data:
        expected = F.cross_entropy(plain(batch[0]), batch[1])
        expected.backward()
        theirs.step()
        theirs.zero_grad()
        assert torch.equal(step(*batch), expected)
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(p.grad is None for p in model.parameters())
    assert frozen is model[3].bias
    # The gradients of both matrices are never there at once.
    peaks = [one.plans[0].plan.plain.peak for one in (step, other)]
    assert peaks[0] < peaks[1] - 96 * 96 * 2
    with pytest.raises(UsageError, match="no gradients"):
        step.backward(*data[0])
    with pytest.raises(UsageError, match="needs an optimizer"):
        mopt.fit(model, F.cross_entropy, data[0], update_at_once=True)


class Adapted(nn.Module):
    """A frozen layer, and one with a trained low-rank part beside its frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.adapted, self.head = (nn.Linear(64, 64) for _ in range(3))
        self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.adapted(x) + self.up(self.down(x))
        return self.head(self.plain(x).relu())


@pytest.mark.parametrize("trained", ["lora", "all"])
def test_frozen_weights_keep_nothing_for_their_gradients(trained: str) -> None:
    torch.manual_seed(0)
    model = Adapted().train()
    for name in ("plain", "adapted", "head") if trained == "lora" else ():
        getattr(model, name).requires_grad_(False)
    x = torch.randn(256, 64)
    step = mopt.fit(model, lambda y: y.sum(), (x,), **QUICK)
    problem = step.plans[0].problem
    kept = sum(problem.sizes[s] for s in problem.keep_all)
    row = 256 * 4
    # ReLU's mask or value and what the low-rank part multiplies; the input is there anyway.
    wide = {"lora": 64, "all": 64 + 64 + 64}[trained]
    assert kept <= row * (wide + 4)
    assert kept >= row * (wide // 4 + 4)
    expected = torch.autograd.grad(model(x).sum(), model.down.weight)[0]
    step.backward(x)
    assert torch.equal(model.down.weight.grad, expected)


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


def test_the_error_of_many_gradients_is_not_one_of_float32_sums() -> None:
    exact = {"weight": torch.full((5_000_000,), 0.1)}
    same = _error(exact, exact)
    assert (same.relative, same.cosine) == (0.0, pytest.approx(1.0, abs=1e-12))
    other = _error(exact, {"weight": exact["weight"] * 1.5})
    assert other.relative == pytest.approx(0.5, rel=1e-6)
    assert other.cosine == pytest.approx(1.0, abs=1e-12)
    assert max(same.cosine, other.cosine) <= 1.0
