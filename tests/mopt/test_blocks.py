"""Blocks that can be left out, in models of many kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mopt.blocks import bypass, find_blocks, find_sublayers
from mopt.frontend import capture
from mopt.models import load
from tests import tiny
from tests.case import assert_near, outputs
from tests.mopt.test_capture_transformers import build
from tests.tiny import normal, sample


@pytest.mark.parametrize(("name", "paths", "sums"), [
    ("llama", ["model.layers.0", "model.layers.1"], 4),
    ("bert", ["encoder.layer.0", "encoder.layer.1"], 4),
    ("t5", ["encoder.block.1", "decoder.block.1"], 10),
])  # fmt: skip
def test_blocks_of_transformers_and_what_is_left_without_one(
    name: str, paths: list[str], sums: int
) -> None:
    model, inputs = build(name)
    program = capture(model, inputs(2, 0))
    found, _ = find_blocks(program)
    assert [block.path for block in found] == paths
    assert len(find_sublayers(program)) >= sums
    # The reference: what goes in, where the value that comes out is read.
    block, held = found[1], {}

    def visit(node: torch.fx.Node, value: object) -> object:
        held[node] = value
        return held[block.first] if node is block.last else None

    expected = program.interpret(visit, program.args, program.kwargs)
    before = program.parameter_count()
    bypass(program, [block])
    program.verify()
    assert program.parameter_count() < before
    wanted = [one for one in expected if isinstance(one, Tensor)]
    found_now = outputs(program, program.args, program.kwargs)
    assert_near(wanted, found_now, tolerance=1e-6, what="bypassed")


def test_blocks_of_a_cnn_that_change_the_shape_stay() -> None:
    program = capture(load("resnet50").build(), (torch.zeros(1, 3, 32, 32),))
    found, skips = find_blocks(program)
    assert len(found) == 12 and len(find_sublayers(program)) == 12
    assert any("has the form of its result" in skip.reason for skip in skips)


def test_a_chain_without_sums_has_none() -> None:
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    program = sample(layers, normal(2, 8)).capture()
    found, skips = find_blocks(program)
    assert not found and not skips
    assert not find_sublayers(program)


def test_a_value_that_others_read_too_keeps_its_block() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(tiny.ResidualBlock(4) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.blocks[0](x)
            return self.blocks[1](y), y

    program = sample(Reads(), normal(1, 4, 6, 6)).capture()
    found, _ = find_blocks(program)
    assert [block.path for block in found] == ["blocks.0", "blocks.1"]
    bypass(program, reversed(found))
    first, second = outputs(program, program.args, {})
    assert torch.equal(first, program.args[0]) and torch.equal(second, program.args[0])
