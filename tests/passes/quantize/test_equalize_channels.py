"""equalize-channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.tiny import Apply, normal, sample


def uneven(*layers: nn.Module, x: Tensor) -> Sample:
    """A chain whose first layer has channels that differ a hundredfold in range."""
    made = sample(nn.Sequential(*layers), x, dynamic=True)
    weight = made.module[0].weight
    with torch.no_grad():
        size = torch.logspace(-1, 1, len(weight))
        weight.mul_(size.reshape(-1, *[1] * (weight.dim() - 1)))
    return made


def convolutions() -> Sample:
    return uneven(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
                  nn.Conv2d(8, 6, 1), x=normal(2, 4, 6, 6))  # fmt: skip


def linears() -> Sample:
    return uneven(nn.Linear(8, 16), nn.LeakyReLU(0.1), nn.Linear(16, 4), x=normal(3, 8))


def grouped() -> Sample:
    return uneven(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, groups=2), x=normal(2, 4, 9))


def dead_channel() -> Sample:
    made = linears()
    with torch.no_grad():
        made.module[0].weight[2] = 0
        made.module[2].weight[:, 5] = 0
    return made


def shared() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.layer(torch.relu(m.layer(x)))

    return sample(Apply(forward, layer=nn.Linear(8, 8)), normal(3, 8), dynamic=True)


CASES = [
    Case("depthwise", convolutions, True),
    Case("linears", linears, True),
    Case("grouped", grouped, True),
    Case("dead-channels-stay", dead_channel, True),
    Case("gelu-between", tiny.mlp(), False, skipped="read by aten.gelu"),
    Case("relu6-between", lambda: uneven(nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 4),
                                         x=normal(3, 8)), False, skipped="its output is read by"),
    Case("shared-weight", shared, False, skipped="has other readers"),
    Case("one-layer", tiny.linear(), False),
    Case("excluded", linears, False, {"skip": "2"}),
]  # fmt: skip


def equalized(program: Program) -> Program:
    return Pipeline([make_pass("equalize-channels", {})]).run(program)


@pytest.mark.parametrize("made", [convolutions, linears, grouped])
def test_ranges_meet_in_every_channel(made: object) -> None:
    assert callable(made)
    result = equalized(made().capture())
    found = [tensor for path, tensor in result.weights().items() if "weight" in path]
    before = found[0].flatten(1).abs().amax(1)
    second = found[1].flatten(2) if found[1].dim() > 2 else found[1].unsqueeze(2)
    groups = found[0].shape[0] // found[1].shape[1]
    behind = second.unflatten(0, (groups, -1)).abs().amax((1, 3)).flatten()
    assert torch.allclose(before, behind, rtol=0.01)


def test_one_scale_per_tensor_loses_less_afterwards() -> None:
    program = convolutions().capture()
    result = equalized(program)
    x = normal(16, 4, 6, 6, seed=3)
    wanted = program.run(x)

    def error(candidate: Program) -> float:
        copy = candidate.copy()
        for node in copy.nodes:
            if node.op == "get_attr" and copy.weight(node).dim() > 1:
                weight = copy.weight(node)
                scale = weight.abs().max() / 127
                user = next(iter(node.users))
                rounded = (weight / scale).round() * scale
                user.replace_input_with(node, copy.add_weight("rounded", rounded, user))
        copy.refresh()
        return float((copy.run(x) - wanted).square().mean())

    assert error(result) < 0.5 * error(program)
