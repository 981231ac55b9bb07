"""One command from a local Hugging Face folder to an artifact of ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.cli.command_line import Call

transformers = pytest.importorskip(
    "transformers", reason="the extra hf is not installed: pip install 'mopt[hf]'"
)


def test_a_bert_folder_compiles_runs_at_any_size_and_stays_close(mopt: Call) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128,
    )  # fmt: skip
    original = transformers.BertModel(config).eval()
    original.save_pretrained("my-bert")
    done = mopt("compile", "hf:my-bert", "-r", "int8-dynamic", "--no-measure", "--threads", "1")
    assert done.code == 0, done.err
    assert "100 % of parameters" in done.err
    inputs = {
        "input_ids": torch.randint(1, 500, (3, 21)),
        "attention_mask": torch.tensor([[1] * 21, [1] * 12 + [0] * 9, [1] * 5 + [0] * 16]),
        "token_type_ids": torch.zeros(3, 21, dtype=torch.int64),
    }
    np.savez("x.npz", **{name: value.numpy() for name, value in inputs.items()})
    done = mopt("run", "out/my-bert", "--input", "x.npz", "--output", "y.npz")
    assert done.code == 0, done.err
    outputs = np.load("y.npz")
    with torch.no_grad():
        expected = original(**inputs).last_hidden_state.numpy()
    found = outputs["last_hidden_state"]
    kept = inputs["attention_mask"].bool().numpy()
    cosine = (found * expected).sum(-1) / (
        np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    )
    assert cosine[kept].min() > 0.99
    assert outputs["pooler_output"].shape == (3, 64)
    done = mopt("verify", "out/my-bert", "--model", "hf:my-bert")
    assert done.code == 0, done.err
    assert "same outputs as stored" in done.out
    assert "close to hf:my-bert" in done.out
