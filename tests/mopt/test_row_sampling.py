"""Sampled rows: the expected weight gradient is the gradient, with less spread than plain draws."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import mopt
from mopt.row_sampling import form_of, sample, sampled_bytes, spread_out


def draws(value: Tensor, count: int) -> list[Tensor]:
    form = form_of(value.shape[-1])
    shape = list(value.shape)
    return [
        spread_out(sample(value, form, seed), form, shape, value.dtype) for seed in range(count)
    ]


def test_the_mean_of_many_draws_is_the_gradient() -> None:
    torch.manual_seed(0)
    # Some heavy rows, which are always there, and rows of nothing.
    x = torch.randn(100, 8) * torch.cat((torch.full((5, 1), 5.0), torch.ones(85, 1),
                                         torch.zeros(10, 1)))  # fmt: skip
    gradient = torch.randn(100, 6)
    exact = gradient.T @ x
    count = 1000
    found = torch.stack([gradient.T @ one for one in draws(x, count)])
    spread = float((found - exact).square().sum((1, 2)).mean() / exact.square().sum())
    assert spread > 0
    far = float((found.mean(0) - exact).norm() / exact.norm())
    assert far <= 4 * (spread / count) ** 0.5
    # Along the gradient, where draws differ least: a wrong scale would show.
    along = (found * exact).sum((1, 2)) / exact.square().sum()
    assert abs(float(along.mean()) - 1) <= 4 * float(along.std()) / count**0.5
    # Plain draws by norm, as many of them, spread more.
    share = x.norm(dim=1) / x.norm(dim=1).sum()
    drawn = torch.multinomial(share, 30 * count, replacement=True).view(count, 30)
    plain = torch.stack([(gradient[d] / (30 * share[d, None])).T @ x[d] for d in drawn])
    assert spread < 0.7 * float((plain - exact).square().sum((1, 2)).mean() / exact.square().sum())


def test_rows_take_the_bytes_that_are_planned() -> None:
    value = torch.randn(40, 16)
    packed = sample(value, form_of(16), 0)
    assert packed.numel() == sampled_bytes(form_of(16), 640) == 12 * (16 * 4 + 4)
    assert not spread_out(sample(torch.zeros(40, 16), form_of(16)), form_of(16), [40, 16],
                          torch.float32).any()  # fmt: skip


class Branches(nn.Module):
    """Inputs of linear layers that nothing but their weights' gradients reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_plan_samples_what_only_weights_need() -> None:
    torch.manual_seed(0)
    model = Branches()
    plain, x = copy.deepcopy(model), torch.randn(512, 64)
    state = torch.get_rng_state()
    more = {"memory_budget": "60%", "allow": "lossy", "lossy_form": "rows", "solver": "greedy"}
    step = mopt.fit(model, lambda y: y.square().mean(), (x,), costs="estimated", **more)
    (done,) = step.plans
    kept = {c.form for c in done.problem.forward if c.form and set(c.makes) & done.plan.saved}
    assert kept == {"rows64"}
    assert step.gradient_error is not None
    loss = step.backward(x)
    expected = plain(x).square().mean()
    assert torch.equal(loss, expected)
    assert torch.equal(torch.get_rng_state(), state), "the model's random numbers are untouched"
    total = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(60):
        model.zero_grad()
        step.backward(x)
        for sum_, p in zip(total, model.parameters(), strict=True):
            sum_ += p.grad / 60
    expected.backward()
    for mean, p in zip(total, plain.parameters(), strict=True):
        torch.testing.assert_close(mean, p.grad, rtol=0, atol=0.35 * float(p.grad.abs().max()))
