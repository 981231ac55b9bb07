"""What an exported file holds: nothing of this machine, each weight once, always the same bytes."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.backends.onnx.export import export_onnx
from mopt.backends.onnx.operators import OPERATORS
from mopt.errors import ArtifactError, LoweringError
from mopt.frontend import capture
from mopt.lowering import load, lower
from tests.backends.onnx.exported import captured, dynamic, export

TOLERANCE = 2e-6


class Language(nn.Module):
    """Tied embedding, norm, a layer and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(60, 32)
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)
        self.unused = nn.Parameter(torch.ones(7, 11))
        self.register_buffer("positions", torch.randn(16, 32))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.linear(x, self.tokens.weight)


def language() -> Language:
    torch.manual_seed(0)
    return Language()


TOKENS = torch.arange(12).reshape(2, 6)
SHAPES = dynamic({0: "batch", 1: "length"}, largest=16)


def test_equal_numbers_at_other_sizes() -> None:
    result = export(language(), (TOKENS,), SHAPES)
    assert result.error(TOKENS) < TOLERANCE
    assert result.error(torch.randint(60, (1, 16))) < TOLERANCE
    onnx.checker.check_model(onnx.load_from_string(result.serialized))


def test_example_of_batch_one_stays_dynamic() -> None:
    """Captured with another batch, as capture does, then exported with the example of one row."""
    graph_module = captured(language(), (TOKENS,), SHAPES)
    model = export_onnx(graph_module, (TOKENS[:1],), {}, SHAPES)
    assert [isinstance(size, int) for size in model.graph.inputs[0].shape] == [False, False]


def test_weights_carry_module_paths_and_are_stored_once() -> None:
    result = export(language(), (TOKENS,), SHAPES)
    graph = onnx.load_from_string(result.serialized).graph
    sizes = {w.name: int(np.prod(w.dims)) for w in graph.initializer}
    assert {"tokens.weight", "up.weight", "up.bias", "down.weight"} <= set(sizes)
    assert sum(size == 60 * 32 for size in sizes.values()) == 1
    assert "unused" not in sizes


def test_linear_weights_lie_as_the_product_reads_them() -> None:
    result = export(language(), (TOKENS,), SHAPES)
    graph = onnx.load_from_string(result.serialized).graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    assert shapes["up.weight"] == [32, 48]
    assert shapes["tokens.weight"] == [60, 32]
    assert result.operators()["Transpose"] == 1  # of the tied weight, which ONNX Runtime folds
    assert result.kernels()["Transpose"] == 0


def test_a_weight_used_twice_by_linears_is_laid_out_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    result = export(Twice(), (torch.randn(2, 3, 8),))
    assert result.operators() == {"MatMul": 2, "Add": 2}
    assert result.error(torch.randn(2, 3, 8)) < TOLERANCE


def test_nothing_of_this_machine_is_in_the_file() -> None:
    proto = onnx.load_from_string(export(language(), (TOKENS,), SHAPES).serialized)
    for weight in proto.graph.initializer:
        weight.ClearField("raw_data")  # numbers may hold any byte
    content = proto.SerializeToString()
    for trace in (b"/", b".py", b"pkg.torch", b"stack_trace", b"test_export", b"Language"):
        assert trace not in content, trace


def test_names_of_inputs_and_outputs_can_be_chosen() -> None:
    graph_module = captured(language(), (TOKENS,), SHAPES)
    model = export_onnx(
        graph_module, (TOKENS,), {}, SHAPES, input_names=["ids"], output_names=["logits"]
    )
    assert [v.name for v in model.graph.inputs] == ["ids"]
    assert [v.name for v in model.graph.outputs] == ["logits"]


_HASH = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from tests.backends.onnx import test_export
content = test_export.export(test_export.language(), (test_export.TOKENS,), test_export.SHAPES)
print(hashlib.sha256(content.serialized).hexdigest())
"""


def test_two_processes_write_the_same_bytes_and_print_nothing(tmp_path: Path) -> None:
    here = hashlib.sha256(export(language(), (TOKENS,), SHAPES).serialized).hexdigest()
    there = subprocess.run(
        [sys.executable, "-c", _HASH, str(Path(__file__).parents[3])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout == here + "\n"
    assert there.stderr == ""


def test_exporting_twice_leaves_the_graph_as_it_was() -> None:
    graph_module = captured(language(), (TOKENS,), SHAPES)
    before = str(graph_module.graph)
    weights = {name: t.clone() for name, t in graph_module.state_dict().items()}
    export_onnx(graph_module, (TOKENS,), {}, SHAPES)
    assert str(graph_module.graph) == before
    assert all(torch.equal(t, weights[name]) for name, t in graph_module.state_dict().items())


@torch.library.custom_op("mopt_test::untranslated", mutates_args=())
def untranslated(x: Tensor) -> Tensor:
    return x.clone()


@untranslated.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_without_translation_is_named() -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.mopt_test.untranslated(x)

    with pytest.raises(LoweringError, match="untranslated") as caught:
        export(Strange(), (torch.randn(2),))
    assert caught.value.code == "onnx-export"


@pytest.mark.parametrize("name", ["digits-cnn", "pydoc-gpt"])
def test_zoo_models_consist_of_listed_operators(name: str) -> None:
    from mopt import models

    entry = models.load(name)
    shapes = entry.dynamic_shapes() if entry.dynamic_shapes else None
    inputs = entry.example_inputs()
    result = export(entry.build(), inputs, shapes)
    used = {(node.domain, node.op_type) for node in result.model.graph.all_nodes()}
    assert used <= OPERATORS
    assert result.error(*inputs) < 1e-5


def test_sizes_in_the_file_carry_the_users_names(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = capture(nn.Linear(4, 2).eval(), (torch.ones(3, 4),), ({0: batch},))
    folder = lower(program, "onnx").save(tmp_path / "out")
    graph = onnx.load(folder / "model.onnx").graph
    for value in (graph.input[0], graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_large_models_keep_their_weights_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """protobuf ends at 2 GiB; what counts is the size of the weights, here as of 1 kB."""
    monkeypatch.setattr("mopt.backends.onnx.lower.EXTERNAL_FROM_BYTES", 1000)
    module, x = (
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(),
        torch.ones(2, 16),
    )
    folder = lower(capture(module, (x,)), "onnx").save(tmp_path / "out")
    assert (folder / "model.onnx.data").stat().st_size >= 16 * 32 * 4
    moved = folder.rename(tmp_path / "moved")
    assert torch.allclose(load(moved)(x), module(x), atol=1e-5)
    raw = bytearray((moved / "model.onnx.data").read_bytes())
    raw[100] ^= 1
    (moved / "model.onnx.data").write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data"):
        load(moved)


def test_no_copy_of_the_weights_stays_behind() -> None:
    """The exporter's rewrite rules keep the last graph they saw."""
    module = nn.Sequential(OrderedDict(seen_nowhere_else=nn.Linear(64, 64)))
    lower(capture(module.eval(), (torch.ones(3, 64),)), "onnx")
    gc.collect()
    graphs = [found for found in gc.get_objects() if type(found) is ir.Graph]
    held = {v.name: v.const_value for g in graphs for v in g.initializers.values()}
    assert not [name for name, value in held.items()
                if "seen_nowhere_else" in str(name) and value is not None]  # fmt: skip
