"""Optimizers with less state: what they keep, how they project, that they train."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.errors import InputError
from mopt.optim import FloatEightAdamW, LowRankAdamW, compact, expanded
from mopt.optimizer_state import state_bytes

Make = Callable[[nn.Module], torch.optim.Optimizer]


def train(make: Make, steps: int = 60) -> tuple[float, torch.optim.Optimizer]:
    """The loss of a small net on a fixed task after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    x = torch.randn(64, 32)
    y = torch.tanh(x @ torch.randn(32, 32) / 6)
    optimizer = make(model)
    for _ in range(steps):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(F.mse_loss(model(x), y)), optimizer


def low_rank(**options: object) -> Make:
    more = {"rank": 8, "every": 10, "scale": 1.0, **options}
    return lambda model: LowRankAdamW(model.parameters(), 1e-2, **more)  # type: ignore[arg-type]


KINDS = {"svd": {}, "quantized": {"quantized": True}, "dct": {"projection": "dct", "every": 1}}


@pytest.mark.parametrize("kind", KINDS)
def test_projected_moments_train_with_less_state(kind: str) -> None:
    start, _ = train(low_rank(**KINDS[kind]), steps=0)
    adam, full = train(lambda model: torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0))
    found, ours = train(low_rank(**KINDS[kind]))
    assert adam < 0.2 * start
    assert found < 0.4 * start
    # The one cosine basis is as large as a matrix of this small net; it is shared in a large one.
    assert state_bytes(ours) < (0.75 if kind == "dct" else 0.5) * state_bytes(full)
    shapes = [tuple(s["first"].shape) for s in ours.state.values()]
    assert shapes == [(64, 8), (64,), (64, 8), (32,)]


def test_the_projection_is_orthonormal_and_holds_the_gradient() -> None:
    weight = nn.Parameter(torch.zeros(40, 24))
    gradient = torch.randn(40, 4) @ torch.randn(4, 24)
    optimizer = LowRankAdamW([weight], 1.0, rank=4, scale=1.0)
    weight.grad = gradient.clone()
    optimizer.step()
    basis = optimizer.state[weight]["basis"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient @ basis @ basis.mT, gradient, atol=1e-4, rtol=0)
    # The step lies in the projection too.
    torch.testing.assert_close(weight @ basis @ basis.mT, weight.data, atol=1e-4, rtol=0)


def test_small_parameters_get_plain_adamw() -> None:
    one, two = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    ours = LowRankAdamW([one], 1e-2, rank=4, weight_decay=0.1)
    theirs = torch.optim.AdamW([two], 1e-2, weight_decay=0.1)
    for step in range(5):
        for p in (one, two):
            p.grad = torch.full((3, 4), 0.1 * step) + p.detach()
        ours.step()
        theirs.step()
    torch.testing.assert_close(one.data, two.data, atol=1e-6, rtol=1e-6)


def test_a_gradient_of_nothing_keeps_the_projection() -> None:
    weight = nn.Parameter(torch.randn(16, 16))
    optimizer = LowRankAdamW([weight], 1e-2, rank=4, every=1)
    weight.grad = torch.randn(16, 16)
    optimizer.step()
    before = optimizer.state[weight]["basis"].clone()
    weight.grad = torch.zeros(16, 16)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(optimizer.state[weight]["basis"], before)
    assert weight.isfinite().all()


def test_a_direction_that_stays_is_looked_for_less_often() -> None:
    weight = nn.Parameter(torch.randn(16, 16))
    optimizer = LowRankAdamW([weight], 1e-3, rank=4, every=1, quantized=True)
    gradient = torch.randn(16, 16)
    for _ in range(20):
        weight.grad = gradient.clone()
        optimizer.step()
    assert optimizer.state[weight]["every"] > 1


def _error(values: Tensor) -> float:
    back = expanded(*compact(values), values.shape)
    return float(((back - values).abs() / values.abs()).median())


def test_expanded_fp8_is_finer_than_fp8() -> None:
    torch.manual_seed(0)
    # Second moments of a narrow group, first moments of a normal one; plain E4M3: about 2.2e-2.
    assert _error(torch.exp(0.4 * torch.randn(128 * 64))) < 5e-3
    assert _error(torch.randn(128 * 64)) < 1.5e-2


@pytest.mark.parametrize(
    "values", [torch.zeros(130), torch.full((128,), -2.5), torch.tensor([0.0, 1e-30, 3.0, -1e20])]
)
def test_odd_groups_come_back_finite_with_their_signs(values: Tensor) -> None:
    back = expanded(*compact(values), values.shape)
    assert back.isfinite().all()
    assert torch.equal(back.sign(), values.sign())
    torch.testing.assert_close(back.abs().max(), values.abs().max(), rtol=0.07, atol=0)


def test_float_eight_states_follow_adamw() -> None:
    exact, full = train(lambda model: torch.optim.AdamW(model.parameters(), 1e-2))
    found, ours = train(lambda model: FloatEightAdamW(model.parameters(), 1e-2))
    assert found == pytest.approx(exact, rel=0.3)
    assert state_bytes(ours) < 0.3 * state_bytes(full)


@pytest.mark.parametrize("options", [{"projection": "fft"}, {"rank": 0}, {"betas": (1.0, 0.9)},
                                     {"projection": "dct", "quantized": True}])  # fmt: skip
def test_options_out_of_range_are_named(options: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        low_rank(**options)(nn.Linear(2, 2))
    assert caught.value.code == "optimizer-option"
