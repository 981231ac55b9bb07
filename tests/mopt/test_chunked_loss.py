"""Cross-entropy without logits: equal to the dense one, far smaller, found in graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.allocations import record_allocations
from mopt.chunked_loss import linear_cross_entropy, use_chunked_loss
from tests.backends.test_dynamo import compiled


def case(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(classes, width, requires_grad=True)
    return x, weight, torch.randint(classes, (rows,))


@pytest.mark.parametrize("rows", [1, 33, 70])
def test_loss_and_gradients_are_the_dense_ones(rows: int) -> None:
    x, weight, target = case(rows, 16, 50)
    if rows > 1:
        target[rows // 2] = -100
    expected = torch.autograd.grad(3 * F.cross_entropy(x @ weight.mT, target), (x, weight))
    loss = linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.mT, target))
    found = torch.autograd.grad(3 * loss, (x, weight))
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_the_loss_takes_under_a_twentieth_of_the_dense_one() -> None:
    x, weight, target = case(256, 8, 50_000)

    def peak(dense: bool) -> int:
        x.grad = weight.grad = None
        with record_allocations() as seen:
            if dense:
                loss = F.cross_entropy(x @ weight.mT, target)
            else:
                loss = linear_cross_entropy(x, weight, target)
            loss.backward()
        return seen.total.peak

    # The weight's gradient is there in both, and at its making once more.
    own = 2 * weight.numel() * 4
    assert peak(dense=False) - own < 0.05 * (peak(dense=True) - own)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(300, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 300, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.body(self.tokens(ids))))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def test_the_backend_uses_it_where_it_is_allowed_to() -> None:
    model, ids = Language(), torch.randint(300, (4, 64))
    expected = torch.autograd.grad(model(ids), list(model.parameters()))
    run, _ = compiled(model, chunk_loss=True)
    with record_allocations() as seen:
        found = torch.autograd.grad(run(ids), list(model.parameters()))
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    assert seen.total.peak < 4 * 64 * 300 * 4


def test_other_losses_are_left_alone() -> None:
    seen: list[int] = []

    def backend(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.append(use_chunked_loss(module))
        return module

    head, x, target = nn.Linear(8, 20), torch.randn(5, 8), torch.randint(20, (5,))
    losses = [
        lambda: F.cross_entropy(head(x), target),
        lambda: F.cross_entropy(F.linear(x, head.weight), target, label_smoothing=0.1),
        lambda: F.cross_entropy(F.linear(x, head.weight), target, reduction="sum"),
        lambda: F.cross_entropy(y := F.linear(x, head.weight), target) + y.sum(),
        lambda: F.cross_entropy(F.linear(x, head.weight), target, ignore_index=3),
    ]
    for loss in losses:
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(loss, backend=backend)(), loss())
    assert seen == [0, 0, 0, 0, 1]
