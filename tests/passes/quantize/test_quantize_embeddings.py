"""quantize-embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample


class Tied(nn.Module):
    """A table whose transposed weight is the output head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layer = nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(self.table(ids))))


def tied() -> Sample:
    ids = torch.arange(12).reshape(2, 6)
    return Sample(tiny.sample(Tied()).module, (ids,))


def rows(width: int) -> Sample:
    made = tiny.embedding(40, width)
    return Sample(made.module, (torch.arange(40).reshape(4, 10),))


SMALL = {"min_size": 0}
# Half a step of 127 per row, on values of up to about 3 deviations.
CASES = [
    Case("rows", rows(32), True, SMALL, tolerance=0.01),
    Case("blocks", rows(64), True, SMALL | {"group": 16}, tolerance=0.01),
    Case("min-max", rows(32), True, SMALL | {"ranges": "min-max"}, tolerance=0.01),
    Case("decoder-with-tied-head", tiny.decoder, False, SMALL, skipped="'head' reads the table"),
    Case("blocks-that-do-not-divide", rows(40), False, SMALL | {"group": 16},
         skipped="rows of 40 values are not a multiple of group 16; use group=0"),
    Case("head-reads-the-table-in-float", tied, False, SMALL,
         skipped="'head' reads the table in float too: quantize that layer first"),
    Case("small-tables-stay", rows(32), False, skipped="1280 weights are fewer than min_size 4096"),
    Case("nothing-to-look-up", tiny.mlp(), False, SMALL),
]  # fmt: skip


def after(*names: str) -> Program:
    return Pipeline([make_pass(name, SMALL) for name in names]).run(tied().capture())


def test_a_tied_head_and_table_share_their_codes() -> None:
    result = after("quantize-dynamic", "quantize-embeddings")
    codes = [n.target for n in result.graph.nodes
             if n.op == "get_attr" and result.weight(n).shape == (50, 32)]  # fmt: skip
    assert len(codes) == 2
    assert len(set(codes)) == 1, "one tensor, read twice"
    assert result.size_bytes() == 50 * 32 + 50 * 4 + 50 * 4 + 32 * 32 + 32 * 4 + 32 * 4


def test_a_tied_head_of_4_bits_leaves_no_float_table() -> None:
    result = after("quantize-weights", "quantize-embeddings")
    assert all(t.dtype != torch.float32 or t.numel() < 1600 for t in result.weights().values())
