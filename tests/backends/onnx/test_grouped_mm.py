"""The experts of transformers models: any split of the rows, also experts that get none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mopt.frontend import capture
from mopt.lowering import load, lower
from tests.tiny import normal

pytest.importorskip("transformers", reason="the operator comes with the extra hf")
import transformers.integrations.moe  # noqa: F401  (registers the operator)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(3, 8, 5))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        out: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, self.weight, ends)
        return out


def test_every_split_of_the_rows(tmp_path: Path) -> None:
    model = Experts().eval()
    inputs = (normal(6, 8), torch.tensor([2, 3, 6], dtype=torch.int32))
    program = capture(model, inputs, ({0: torch.export.Dim("rows")}, None))
    run = load(lower(program, "onnx").save(tmp_path / "out"))
    for ends in ([2, 3, 6], [0, 6, 6], [0, 0, 1], [4, 4, 9]):
        rows = normal(ends[-1], 8, seed=ends[0])
        offsets = torch.tensor(ends, dtype=torch.int32)
        assert torch.allclose(run(rows, offsets), model(rows, offsets), atol=1e-5), ends
