"""What has no kernel is handed to a compiler in chains, and is not lost where that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import mopt
from mopt.backends.triton.chains import chained_calls, compile_chains
from mopt.backends.triton.plan import operators_left
from mopt.backends.triton.rewrite import find_sites
from mopt.backends.triton.tiles import chip_of
from mopt.device import find_device
from mopt.program import Program


class Block(nn.Module):
    """Chains around a product, and calls that must stay alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.table = nn.Embedding(5, 8)
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("zero", torch.tensor(3, dtype=torch.uint8))

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.norm(self.table(ids) + x) * 2)
        codes = torch.ops.mopt.quantize(torch.tanh(y) + x, self.scale, self.zero, 0)
        return torch.ops.mopt.dequantize(codes, self.scale, self.zero, 0).relu()


INPUTS = (torch.randint(5, (3,)), torch.randn(3, 8))


def captured() -> Program:
    """The block as a program."""
    torch.manual_seed(0)
    return mopt.capture(Block().eval(), INPUTS)


def names(nodes: Any) -> set[str]:
    """The operators of calls, without their namespaces."""
    return {str(node.target).split(".")[1] for node in nodes if "aten" in str(node.target)}


def test_chains_go_to_the_compiler_and_mean_the_same() -> None:
    program, pieces = captured(), []

    def compiled(piece: nn.Module) -> Callable[..., Any]:
        pieces.append(piece)
        return piece

    module = program.copy().graph_module
    chains = compile_chains(module, compiled)
    assert len(chains) == 2 and [chain.piece for chain in chains] == pieces
    inside = [names(piece.graph.nodes) for piece in pieces]  # type: ignore[union-attr]
    assert {"add", "layer_norm", "mul"} <= inside[0] and "tanh" not in inside[0]
    # Rounding is written out, so that the compiler sees all of the chain.
    assert {"tanh", "round", "clamp", "sub", "relu"} <= inside[1]
    assert "mopt" not in str([n.target for piece in pieces for n in piece.graph.nodes])  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(module(*INPUTS), program.run(*INPUTS))
    outside = {str(n.target) for n in module.graph.nodes if n.op == "call_function"}
    assert outside == {"aten.embedding.default", "aten.linear.default"}


def test_a_chain_that_does_not_compile_runs_as_it_is_and_says_so() -> None:
    def broken(piece: nn.Module) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            raise RuntimeError("no C compiler\nat all")

        return call

    program = captured()
    module = program.copy().graph_module
    chains = compile_chains(module, broken)
    with torch.no_grad():
        assert torch.equal(module(*INPUTS), program.run(*INPUTS))
    assert [chain.failure for chain in chains] == ["no C compiler"] * 2


class Unsafe(nn.Module):
    """Point-wise calls beside some that write in place, draw numbers or give any number of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x + 1).relu_()
        return y[torch.nonzero(y > 0)[:, 0]]


def test_what_writes_or_has_no_size_beforehand_stays_alone() -> None:
    module = mopt.capture(Unsafe().eval(), (torch.randn(4),)).graph_module
    taken = {str(node.target) for node in chained_calls(module, ())}
    assert not {t for t in taken if "_." in t or "nonzero" in t or "index" in t}, taken


def test_the_report_says_who_runs_what_and_how_long() -> None:
    program = captured()
    sites, _ = find_sites(program.graph_module)
    assert not sites
    share, rows = operators_left(program.graph, sites, chip_of(find_device("h200")))
    assert share == 0 and abs(sum(row["time"] for row in rows) - 1) < 1e-9
    by = {row["operator"]: row["by"] for row in rows}
    assert by["aten.layer_norm.default"] == "inductor" and by["aten.linear.default"] == "eager"
