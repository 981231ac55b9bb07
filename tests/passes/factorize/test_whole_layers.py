"""Layers that every pass of the family keeps whole."""

from __future__ import annotations

import torch
from torch import nn

from mopt.frontend import capture
from mopt.layers import find_layers
from mopt.passes.factorize._layers import count_readers, whole_reason
from mopt.program import Program


class Read(nn.Module):
    """A linear layer whose weight is looked at again, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x))) + self.body.weight.sum()


def reasons(program: Program) -> dict[str, str | None]:
    readers = count_readers(program)
    return {layer.path: whole_reason(layer, readers) for layer in find_layers(program)}


def test_a_weight_read_through_another_node_keeps_its_layer_whole() -> None:
    program = capture(Read().eval(), (torch.ones(2, 8),))
    (layer,) = [one for one in find_layers(program) if one.path == "body"]
    other = next(user for user in layer.weight.users if user not in layer.calls)
    with program.graph.inserting_before(other):
        again = program.graph.get_attr(str(layer.weight.target))
    again.meta = dict(layer.weight.meta)
    other.replace_input_with(layer.weight, again)
    program.refresh()
    assert "used elsewhere" in str(reasons(program)["body"])


def test_others_are_free() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    found = reasons(capture(module.eval(), (torch.ones(2, 8),)))
    assert found["0"] is None
    assert "head" in str(found["2"])
