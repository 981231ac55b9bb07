"""Eager artifacts run without the user's code, bit for bit, and hold nothing that could run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import mopt
from mopt.errors import ArtifactError, LoweringError
from mopt.lowering import lower


class Twins(nn.Module):
    """Tied weights, views, slices, several outputs, a dtype argument and an infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        x = self.embedding(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        scores = (x @ x.transpose(1, 2)).masked_fill(~mask, float("-inf")).softmax(-1)
        y = self.head((scores @ x)[:, 1:])
        return {"logits": y, "rest": (y.amax(-1), y.to(torch.float64).sum())}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 5))
    program = mopt.capture(Twins(), (ids,), {"ids": {0: torch.export.Dim("batch")}})
    return lower(program, "eager").save(tmp_path / "out")


def test_runs_bit_for_bit_at_another_batch(artifact: Path) -> None:
    torch.manual_seed(0)
    torch.randint(0, 11, (2, 5))
    model = Twins()
    ids = torch.randint(0, 11, (5, 5))
    with mopt.load(artifact) as run:
        found = run(ids)
    with torch.no_grad():
        expected = model(ids)
    assert torch.equal(found["logits"], expected["logits"])
    assert torch.equal(found.rest[1], expected["rest"][1])
    numpy_out = mopt.load(artifact)(ids.numpy())
    assert (numpy_out["logits"] == expected["logits"].detach().numpy()).all()


def test_tied_weights_are_stored_once(artifact: Path) -> None:
    assert (artifact / "weights.safetensors").stat().st_size < 2 * 11 * 8 * 4


@pytest.mark.parametrize(
    "target",
    ["aten::from_file.default", "torch.load", "os.system", "aten::__class__.default",
     "mopt::__init__.default", "aten::linear.__module__", "builtins.eval"],
)  # fmt: skip
def test_forbidden_operators_are_refused(artifact: Path, target: str) -> None:
    from mopt.backends.eager.graph_file import read_graph

    data = json.loads((artifact / "graph.json").read_text())
    call = next(n for n in data["nodes"] if n["op"] == "call_function")
    call["target"] = target
    with pytest.raises(ArtifactError) as caught:
        read_graph(data, {})
    assert caught.value.code in ("forbidden-operator", "malformed-graph-file")


def test_an_altered_file_is_refused(artifact: Path) -> None:
    graph = artifact / "graph.json"
    graph.write_text(graph.read_text().replace("-inf", "-1.0", 1) + " ")
    with pytest.raises(ArtifactError) as caught:
        mopt.load(artifact)
    assert caught.value.code == "altered-artifact"


def test_what_cannot_be_written_is_listed_with_its_site(tmp_path: Path) -> None:
    @torch.library.custom_op("tests::odd", mutates_args=())
    def odd(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    odd.register_fake(torch.empty_like)

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.tests.odd(x)

    program = mopt.capture(Odd(), (torch.ones(2),))
    with pytest.raises(LoweringError, match=r"tests\.odd") as caught:
        lower(program, "eager")
    assert "test_eager.py" in str(caught.value)
