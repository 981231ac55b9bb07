"""Work in pieces of rows, and what is let go of on the way: the memory of a pass stays bounded."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from mopt.calibration import Calibration
from mopt.formats import base, grid
from mopt.formats.base import Encoded, find_format, row_pieces
from mopt.frontend import capture
from mopt.layers import find_layers
from mopt.pass_base import PassContext
from mopt.passes.quantize import _calibrated, _trainers
from mopt.program import Program
from mopt.streaming import Stream
from tests import tiny
from tests.passes.quantize.calibrated import correlated, one_linear, run_with
from tests.tiny import normal

PASSES: dict[str, dict[str, object]] = {
    "quantize-weights": {"group": 32, "min_size": 0},
    "quantize-gptq": {"group": 32, "min_size": 0, "refinements": 0},
    "quantize-dynamic": {"min_size": 0},
    "quantize-hqq": {"group": 32, "min_size": 0},
    "rotate-activations": {"keep": 1.0},
}


@pytest.mark.parametrize("name", PASSES)
def test_pieces_of_rows_give_what_the_whole_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for piece in (1 << 20, 5 * 64):  # the whole weight, or five rows of it
        monkeypatch.setattr(base, "_PIECE", piece)
        monkeypatch.setattr(grid, "_PIECE", piece)
        monkeypatch.setattr(_calibrated, "_ROUNDED_TOGETHER", piece)
        done = run_with(one_linear(), [correlated(40, 64)], (name, PASSES[name]))
        results.append((done.weights(), done.steps[-1].stats))
    whole, parts = results
    assert whole[0].keys() == parts[0].keys()
    for path, tensor in whole[0].items():
        assert torch.equal(tensor, parts[0][path]), path
    for key in {"weight_error", "output_error", "error_left"}.intersection(whole[1]):
        assert parts[1][key] == pytest.approx(whole[1][key], rel=1e-5)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym", "int8-channel", "int2-g128"])
def test_other_work_on_the_machine_changes_how_a_weight_is_divided_and_no_bit_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, form = normal(600, 256), find_format(name)
    pieces, search = [], grid._search
    monkeypatch.setattr(
        grid, "_search", lambda *given: pieces.append(given[0].numel()) or search(*given)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = []
    for crowded in (False, True):
        monkeypatch.setattr(grid, "is_crowded", lambda crowded=crowded: crowded)
        found.append(form.encode(weight).tensors)
    assert len(pieces) > 2 and min(pieces) < 1 << 15 < pieces[0]
    assert found[0].keys() == found[1].keys()
    for part, tensor in found[0].items():
        assert torch.equal(tensor, found[1][part]), part


def test_rounding_in_the_search_is_that_of_torch_wherever_codes_are() -> None:
    values = torch.cat([torch.arange(-600, 600) / 4, torch.tensor([2.5e4, -1e38, 1e38])])
    for kind in (torch.float32, torch.float64):
        exact = values.to(kind)
        rounded = grid.round_(exact.clone())
        assert torch.equal(rounded.clamp(-256, 256), exact.round().clamp(-256, 256))


@pytest.mark.parametrize("name", ["quantize-adaround", "quantize-qat"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_large_product_is_trained_as_its_rows_alone_would_be(
    name: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rows should give is not kept for all of them, and they share no step."""
    monkeypatch.setattr(_trainers, "_TOGETHER", 8 * 64)
    batches = [correlated(40, 64, seed) for seed in range(3)]
    weight, added = normal(20, 64, seed=5) / 8, normal(20, seed=6) if bias else None

    def trained(rows: slice) -> Program:
        layer = nn.Linear(64, len(weight[rows]), bias=bias).eval()
        with torch.no_grad():
            layer.weight.copy_(weight[rows])
            if added is not None:
                layer.bias.copy_(added[rows])
        options = {"bits": 2, "group": 32, "min_size": 0, "steps": 60,
                       "start": "nearest", "rate": 0.1, "ranges": "mse"}  # fmt: skip
        return run_with(capture(layer, (batches[0],)), batches, (name, options))

    whole = trained(slice(0, 20))
    stats = whole.steps[-1].stats
    assert stats["error_kept"].keys() == stats["formats"].keys()
    kept = []
    for rows in (slice(0, 8), slice(8, 16), slice(16, 20)):
        alone = trained(rows)
        found = whole.run(batches[0])[:, rows]
        torch.testing.assert_close(found, alone.run(batches[0]), rtol=1e-5, atol=1e-5)
        kept += [*alone.steps[-1].stats["error_kept"].values()] * len(weight[rows])
    assert sum(kept) / 20 == pytest.approx(next(iter(stats["error_kept"].values())), rel=1e-4)
    assert sum(kept) / 20 < 1


@pytest.mark.parametrize("name", ["int4-g32-asym", "int2-g16", "int8-channel", "int8-dynamic"])
def test_encodings_are_cut_and_joined_by_rows(name: str) -> None:
    form, weight = find_format(name), normal(11, 64)
    whole = form.encode(weight)
    pieces = [whole.rows(slice(0, 4)), whole.rows(slice(4, 11))]
    assert [piece.shape for piece in pieces] == [(4, 64), (7, 64)]
    decoded = torch.cat([form.decode(piece) for piece in pieces])
    assert torch.equal(decoded, form.decode(whole))
    joined = Encoded.join(iter(pieces), 11)
    assert joined.shape == whole.shape
    assert all(torch.equal(joined.tensors[key], whole.tensors[key]) for key in whole.tensors)


def test_pieces_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_PIECE", 100)
    for shape in [(7, 30), (1, 500), (10, 3, 3, 3), (4,), (0, 8)]:
        rows = [row for at in row_pieces(torch.zeros(shape)) for row in range(shape[0])[at]]
        assert rows == list(range(shape[0]))


def test_a_stream_lets_go_of_weights_whose_calls_lie_behind() -> None:
    program = tiny.mlp().capture()
    first, second = (layer for layer in find_layers(program) if layer.kind == "linear")
    calls = Calibration([program.args], program)
    stream = Stream(program, calls, PassContext())
    rounded = torch.zeros_like(program.weight(first.weight))
    stream.replace_weight(first.calls, first.weight, rounded)
    held = weakref.ref(rounded)
    del rounded
    stream.advance(first.calls[0])
    assert held() is not None
    stream.advance(second.calls[0])
    assert held() is None
    # The values are those that the replaced weight gave, not the program's own.
    seen = stream.values(second.calls[0].args[0])[0]  # type: ignore[arg-type]
    assert float((seen - seen[:1]).abs().max()) == 0


def test_a_replaced_weight_is_let_go_of() -> None:
    program = tiny.mlp().capture().copy()
    layer = next(layer for layer in find_layers(program) if layer.kind == "linear")
    form = find_format("int8-dynamic")
    held = weakref.ref(getattr(program.graph_module.get_submodule("0"), "weight", None))
    assert held() is not None
    form.place(program, layer, form.encode(program.weight(layer.weight)))
    gc.collect()
    assert held() is None
    program.verify()
