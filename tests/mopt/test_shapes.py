"""Shapes are derived again where an edit changes them, and only there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mopt.driver import BASELINE
from mopt.frontend import capture
from mopt.pipeline import Pipeline
from mopt.recipe import Recipe


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0]
        return out


class Twice(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y, x])


def test_an_lstm_with_any_batch_is_simplified() -> None:
    """PyTorch has no shape rule for one with symbolic sizes: its shape must not be asked again."""
    x = torch.randn(3, 4, 6)
    model = Tagger().eval()
    program = capture(model, (x,), ({0: torch.export.Dim("batch")},))
    result = Pipeline(Recipe.load(BASELINE).passes()).run(program)
    for rows in (1, 7):
        other = torch.randn(rows, 4, 6)
        torch.testing.assert_close(result.run(other), model(other))


def test_an_argument_that_is_exchanged_for_another_counts() -> None:
    """Both graphs read the same two values, in the same number of places."""
    program = capture(Twice().eval(), (torch.randn(2, 3), torch.randn(5, 3)), None)
    (cat,) = [n for n in program.graph.nodes if n.target is torch.ops.aten.cat.default]
    x, y, _ = cat.args[0]
    cat.args = ([x, y, y],)
    program.refresh()
    assert cat.meta["val"].shape == (12, 3)


def test_a_node_described_like_another_has_a_value_of_its_own() -> None:
    """A pass that adds a call copies where it comes from, and may copy what its shape came from."""
    x = torch.randn(2, 4)
    program = capture(nn.Linear(4, 4).eval(), (x,))
    program.refresh()
    (call,) = (n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    expected = program.run(x)
    more = program.insert_call(call.target, call.args, like=call.next)
    more.meta.update({key: value for key, value in call.meta.items() if key != "val"})
    total = program.insert_call(torch.ops.aten.add.Tensor, (call, more), like=more.next)
    call.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    program.refresh()
    assert more.meta["val"].shape == (2, 4)
    torch.testing.assert_close(program.run(x), 2 * expected)
