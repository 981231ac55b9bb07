"""Local Hugging Face folders, made here from small configurations."""

from __future__ import annotations

import copy
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mopt.errors import InputError, MoptError
from mopt.frontend import capture
from mopt.model_source import load_source

transformers = pytest.importorskip(
    "transformers", reason="the extra hf is not installed: pip install 'mopt[hf]'"
)

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a local folder was enough, and yet the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(vocab_size=200, **TINY))


def roberta() -> Any:
    config = transformers.RobertaConfig(
        vocab_size=200, max_position_embeddings=40, type_vocab_size=1, **TINY
    )
    return transformers.RobertaModel(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=200, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=200, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> Any:
    config = transformers.ViTConfig(image_size=32, patch_size=16, **TINY)
    return transformers.ViTForImageClassification(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=200, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=10, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def clip() -> Any:
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 200, "bos_token_id": 0, "eos_token_id": 2, **TINY},
        vision_config={"image_size": 32, "patch_size": 16, **TINY},
        projection_dim=16,
    )
    return transformers.CLIPModel(config)


def save(model: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(bert(), tmp_path_factory.mktemp("hf") / "my-bert")


@pytest.mark.parametrize(
    ("make", "inputs", "outputs"),
    [
        (bert, {"input_ids": (1, 128), "attention_mask": (1, 128), "token_type_ids": (1, 128)},
         ["last_hidden_state", "pooler_output"]),
        (roberta, {"input_ids": (1, 38), "attention_mask": (1, 38)},
         ["last_hidden_state", "pooler_output"]),
        (gpt2, {"input_ids": (1, 128), "attention_mask": (1, 128)}, ["logits"]),
        (t5, {"input_ids": (1, 128), "attention_mask": (1, 128), "decoder_input_ids": (1, 32)},
         ["logits", "encoder_last_hidden_state"]),
        (vit, {"pixel_values": (1, 3, 32, 32)}, ["logits"]),
        (whisper, {"input_features": (1, 8, 20), "decoder_input_ids": (1, 32)},
         ["logits", "encoder_last_hidden_state"]),
        (clip, {"input_ids": (1, 77), "attention_mask": (1, 77), "pixel_values": (1, 3, 32, 32)},
         ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]),
    ],
)  # fmt: skip
def test_every_kind_gets_inputs_it_runs_on_and_plain_named_outputs(
    make: Callable[[], Any], inputs: dict[str, tuple[int, ...]], outputs: list[str], tmp_path: Path
) -> None:
    source = load_source(f"hf:{save(make(), tmp_path / 'folder')}")
    assert {k: tuple(v.shape) for k, v in source.example_inputs.items()} == inputs
    with torch.no_grad():
        found = source.model(**source.example_inputs)
    assert type(found) is dict
    assert list(found) == outputs
    assert source.notes == ()


def test_bert_is_captured_whole_with_its_own_names_and_any_length(bert_folder: Path) -> None:
    source = load_source(f"hf:{bert_folder}")
    assert source.name == "my-bert"
    program = capture(source.model, source.example_inputs, source.dynamic_shapes)
    assert program.coverage.is_whole
    assert "encoder.layer.0.attention.self.query.weight" in program.weights()
    other = {
        "input_ids": torch.randint(1, 200, (3, 17)),
        "attention_mask": torch.tensor([[1] * 17, [1] * 9 + [0] * 8, [1] * 3 + [0] * 14]),
        "token_type_ids": torch.zeros(3, 17, dtype=torch.int64),
    }
    expected = transformers.BertModel.from_pretrained(bert_folder).eval()
    with torch.no_grad():
        wanted = expected(**other).last_hidden_state
    torch.testing.assert_close(program.run(**other)["last_hidden_state"], wanted)


def test_a_copy_of_the_model_uses_its_own_weights(bert_folder: Path) -> None:
    source = load_source(f"hf:{bert_folder}")
    twin = copy.deepcopy(source.model)
    with torch.no_grad():
        for parameter in source.model.parameters():
            parameter.zero_()
        assert float(twin(**source.example_inputs)["last_hidden_state"].abs().sum()) > 0


def test_a_sentence_transformers_folder_gives_its_transformer(
    bert_folder: Path, tmp_path: Path
) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "0_Transformer",
         "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling",
         "type": "sentence_transformers.models.Pooling"},
    ]  # fmt: skip
    shutil.copytree(bert_folder, tmp_path / "0_Transformer")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    source = load_source(f"hf:{tmp_path}")
    assert "input_ids" in source.example_inputs
    assert "Pooling" in source.notes[0]
    modules[0]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(MoptError) as raised:
        load_source(f"hf:{tmp_path}")
    assert raised.value.code == "unsafe-path"


def test_weights_in_half_precision_are_computed_in_float32(tmp_path: Path) -> None:
    source = load_source(f"hf:{save(bert().half(), tmp_path / 'half')}")
    assert {p.dtype for p in source.model.parameters()} == {torch.float32}


def test_a_missing_head_is_told(tmp_path: Path) -> None:
    folder = save(bert(), tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "classifier" in load_source(f"hf:{folder}").notes[0]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folders_that_are_refused_say_why(bert_folder: Path, tmp_path: Path) -> None:
    def code_of(change: Callable[[Path], None]) -> tuple[str, str]:
        folder = tmp_path / f"case-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(bert_folder, folder)
        change(folder)
        with pytest.raises(InputError) as raised:
            load_source(f"hf:{folder}")
        return raised.value.code, str(raised.value)

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    code, said = code_of(pickled)
    assert code == "pickled-weights"
    assert "save_pretrained" in said
    assert code_of(lambda f: (f / "model.safetensors").unlink())[0] == "missing-weights"
    assert code_of(lambda f: (f / "config.json").unlink())[0] == "not-a-hf-folder"
    assert code_of(lambda f: (f / "model.safetensors").write_bytes(b"x"))[0] == "safetensors-header"
    own_code = {"model_type": "not-known", "architectures": ["Own"],
                "auto_map": {"AutoModel": "modeling.Own"}}  # fmt: skip
    code, said = code_of(lambda f: edit_config(f, **own_code))
    assert code == "unknown-architecture"
    assert "never runs" in said
    code, said = code_of(lambda f: edit_config(f, architectures=["BertForTheFuture"]))
    assert code == "unknown-architecture"
    assert "BertForTheFuture" in said


def test_code_in_the_folder_is_never_run(bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(bert_folder, folder)
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(folder, auto_map={"AutoModel": "modeling.Own", "AutoConfig": "modeling.Own"})
    load_source(f"hf:{folder}")
    assert not (tmp_path / "ran").exists()


def test_an_index_may_not_name_files_outside(bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(bert_folder, folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"pooler.dense.bias": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MoptError) as raised:
        load_source(f"hf:{folder}")
    assert raised.value.code == "unsafe-path"


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_large_weights_stay_in_their_files(
    half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(gpt2().half() if half else gpt2(), tmp_path / "folder")
    copied = load_source(f"hf:{folder}").model
    monkeypatch.setattr("mopt.hf_folder.MAPPED_FROM_BYTES", 1)
    mapped = load_source(f"hf:{folder}").model
    for name, weight in copied.state_dict().items():
        found = mapped.state_dict()[name]
        assert found.dtype == weight.dtype and torch.equal(found, weight), name
    pages = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [
        [int(end, 16) for end in line[0].split("-")] for line in pages
        if len(line) > 5 and "w" not in line[1]
        and ("(deleted)" in line or "folder" in line[5])
    ]  # fmt: skip
    for name, parameter in mapped.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in files), name
