"""Weights in blocks: read as they are by calls with few rows, widened at load for many."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

import mopt
from mopt.backends.onnx.session import check_file
from mopt.flops import ModelSize
from mopt.formats import int_blocks
from mopt.formats.base import widened_layers
from mopt.limits import DEFAULT_LIMITS
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass

SMALL = ModelSize(bytes=0, flops=0)


def packed(rows: int, name: str = "quantize-weights", **options: object) -> Program:
    """A linear of 96 inputs on that many rows, its weight in 4 bits."""
    torch.manual_seed(0)
    program = mopt.capture(torch.nn.Linear(96, 64), (torch.randn(rows, 96),))
    return Pipeline([make_pass(name, options)]).run(program)


def lowered(program: Program, folder: Path) -> Counter[str]:
    """The operators of the file, written to ``folder``."""
    mopt.lower(program, backend="onnx").save(folder)
    model = onnx.load(folder / "model.onnx")
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(("rows", "operator"), [(8, "MatMulNBits"), (64, "MatMul")])
def test_rows_decide(rows: int, operator: str, tmp_path: Path) -> None:
    program = packed(rows)
    assert lowered(program, tmp_path / "out")[operator] == 1
    x = torch.randn(rows, 96)
    found = torch.as_tensor(mopt.load(tmp_path / "out")(x))
    torch.testing.assert_close(found, program.run(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_a_row_is_stored_once_and_means_the_same(symmetric: bool, tmp_path: Path) -> None:
    program = packed(64, group=0, symmetric=symmetric)
    assert lowered(program, tmp_path / "out")["MatMul"] == 1
    x = torch.randn(64, 96)
    found = torch.as_tensor(mopt.load(tmp_path / "out")(x))
    torch.testing.assert_close(found, program.run(x), rtol=1e-4, atol=1e-5)


def test_layers_that_are_floats_while_they_run_are_known() -> None:
    assert len(widened_layers(packed(64))) == 1
    assert widened_layers(packed(8)) == set()
    assert len(widened_layers(packed(64, "store-int8"))) == 1


@pytest.mark.parametrize("name", ["quantize-weights", "quantize-levels"])
def test_what_is_widened_may_be_folded_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    """Without folding the weights would be widened in every run."""
    lowered(packed(64, name), tmp_path / "out")
    limits = replace(DEFAULT_LIMITS, fold_bytes=1)
    assert check_file(tmp_path / "out" / "model.onnx", limits=limits).may_fold


def test_large_models_keep_their_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int_blocks, "_LARGE_BYTES", 1000)
    assert lowered(packed(64), tmp_path / "out")["MatMulNBits"] == 1


def test_long_groups_pay_off_for_many_rows_of_wide_layers() -> None:
    short, long = int_blocks.IntBlocks(4, 32), int_blocks.IntBlocks(4, 128)
    assert not short.keeps_codes(256, (4096, 4096), SMALL)
    assert long.keeps_codes(256, (4096, 4096), SMALL)
    assert not long.keeps_codes(256, (768, 768), SMALL)
    assert short.keeps_codes(16, (4096, 4096), SMALL)
    assert not short.keeps_codes(16, (768, 768), SMALL)


def test_a_layer_that_takes_none_of_the_time_does_not_round_its_input(tmp_path: Path) -> None:
    """The classifier of an image model reads one row; the rest of the model reads many."""
    torch.manual_seed(0)

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(96, 96)
            self.head = torch.nn.Linear(96, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x).mean(1))

    program = mopt.capture(Classifier(), (torch.randn(1, 4096, 96),))
    program = Pipeline([make_pass("quantize-weights", {"bits": 8})]).run(program)
    assert lowered(program, tmp_path / "out")["MatMulNBits"] == 0
    form = int_blocks.IntBlocks(4, 32)
    assert form.keeps_codes(1, (4096, 4096), ModelSize(bytes=1 << 31, flops=1 << 60))
