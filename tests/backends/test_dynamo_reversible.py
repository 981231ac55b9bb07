"""Reversible blocks: inputs are had again from outputs, where rounding is allowed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mopt.reversible import INVERSE
from mopt.training import GraphPlan
from tests.backends.test_dynamo import compiled, plans, step

ROWS = 512


class Reversible(nn.Module):
    """Two streams that change each other by turns; ``scale`` multiplies the first one."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(12)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for i in range(0, len(self.parts), 2):
            x = x * self.scale + self.parts[i](y) if self.scale != 1 else x + self.parts[i](y)
            y = y + self.parts[i + 1](x)
        return x + y


def fitted(model: nn.Module, budget: str, allow: str) -> tuple[list[Tensor], GraphPlan]:
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, 32), torch.randn(ROWS, 32)
    run, options = compiled(model, memory_budget=budget, allow=allow)
    found = step(run, model, x, y)
    (done,) = plans(options)
    return found, done


def inverses(done: GraphPlan) -> int:
    return sum(done.problem.forward[i].form == INVERSE for i in done.plan.repeats())


def test_inputs_follow_from_outputs() -> None:
    torch.manual_seed(1)
    model = Reversible()
    expected, exact = fitted(copy.deepcopy(model), "45%", "exact")
    found, done = fitted(model, "45%", "rounding")
    assert not inverses(exact) and inverses(done)
    assert done.plan.seconds < exact.plan.seconds
    assert done.plan.figures.peak <= done.plan.budget
    assert not all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_scales_that_multiply_rounding_errors_end_the_span() -> None:
    torch.manual_seed(1)
    _, done = fitted(Reversible(0.1), "45%", "rounding")
    problem = done.problem
    undone = [
        problem.forward[problem.maker[call.again.reads[0]]].name
        for call in problem.forward if call.form == INVERSE and call.again
    ]  # fmt: skip
    # From the outputs back: an error grows tenfold with each of the six scales (the first one
    # scales the input, which is there), and four times are what float32 bears in a row.
    assert sorted(name for name in undone if name.startswith("mul")) == [
        "mul_2", "mul_3", "mul_4", "mul_5",
    ]  # fmt: skip
