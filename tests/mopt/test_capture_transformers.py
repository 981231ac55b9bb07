"""Models of transformers, tiny and with random weights, are captured whole and simplified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from mopt.frontend import capture
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests.case import assert_near, assert_same, outputs
from tests.tiny import normal

transformers = pytest.importorskip(
    "transformers", reason="transformers is an optional dependency (extra: hf)"
)

BATCH, TIME = Dim("batch"), Dim("time", max=30)
DECODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
SIMPLIFY = (
    "fold-constants", "remove-no-ops", "merge-duplicates", "fold-batch-norm",
    "fold-norm-affine", "fold-scale",
)  # fmt: skip


def tokens(batch: int, time: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (batch, time), generator=generator)


def text(batch: int, seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(batch, 6, seed)}


def masked_text(batch: int, seed: int) -> dict[str, Tensor]:
    """The last two tokens of the first row are padding."""
    mask = torch.ones(batch, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": tokens(batch, 6, seed), "attention_mask": mask}


def translation(batch: int, seed: int) -> dict[str, Tensor]:
    return {**text(batch, seed), "decoder_input_ids": tokens(batch, 4, seed + 1)}


def image(batch: int, seed: int) -> dict[str, Tensor]:
    return {"pixel_values": normal(batch, 3, 16, 16, seed=seed)}


def speech(batch: int, seed: int) -> dict[str, Tensor]:
    features = normal(batch, 8, 32, seed=seed)
    return {"input_features": features, "decoder_input_ids": tokens(batch, 4, seed)}


def image_and_text(batch: int, seed: int) -> dict[str, Tensor]:
    return {**masked_text(batch, seed), **image(batch, seed)}


def _t(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**options))


BERT = {**ENCODER, "vocab_size": 64, "max_position_embeddings": 32}
MIXTRAL = {**DECODER, "num_local_experts": 4}
QWEN2_MOE = {
    **DECODER, "moe_intermediate_size": 16, "num_experts": 4, "shared_expert_intermediate_size": 32
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
WHISPER = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 16,
    "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {**ENCODER, "image_size": 16, "patch_size": 4}
CLIP = {
    "text_config": {**ENCODER, "vocab_size": 64, "max_position_embeddings": 32,
                    "eos_token_id": 63, "bos_token_id": 62, "pad_token_id": 0},
    "vision_config": VISION,
    "projection_dim": 16,
}  # fmt: skip

Inputs = Callable[[int, int], dict[str, Tensor]]
MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "bert": (_t("BertModel", "BertConfig", **BERT), masked_text),
    "gpt2": (_t("GPT2LMHeadModel", "GPT2Config", **GPT2), text),
    "llama": (_t("LlamaForCausalLM", "LlamaConfig", **DECODER), masked_text),
    "mixtral": (_t("MixtralForCausalLM", "MixtralConfig", **MIXTRAL), text),
    "qwen2-moe": (_t("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **QWEN2_MOE), text),
    "t5": (_t("T5ForConditionalGeneration", "T5Config", **T5), translation),
    "vit": (_t("ViTForImageClassification", "ViTConfig", **VISION), image),
    "whisper": (_t("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER), speech),
    "clip": (_t("CLIPModel", "CLIPConfig", **CLIP), image_and_text),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Inputs]:
    """The model in eval mode; norms and biases are drawn too, which start at 1 and 0."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, inputs


def dynamic(inputs: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Every batch is dynamic, and the length of every text that is not a decoder's."""
    return {
        name: {0: BATCH, 1: TIME} if name in ("input_ids", "attention_mask") else {0: BATCH}
        for name in inputs
    }


@pytest.mark.parametrize("name", sorted(MODELS))
def test_captured_whole_and_simplified(name: str) -> None:
    model, inputs = build(name)
    example = inputs(1, 0)
    program = capture(model, example, dynamic(example))
    assert program.coverage.is_whole, program.coverage.outside
    result = Pipeline([make_pass(step, {}) for step in SIMPLIFY]).run(program)
    assert len(result.nodes) < len(program.nodes)
    assert not [n for n in result.nodes if "dropout" in str(n.target)]
    assert result.size_bytes() <= program.size_bytes() * 1.01  # a few biases and tables
    for batch, seed in ((1, 1), (3, 2)):
        given = inputs(batch, seed)
        with torch.no_grad():
            expected = model(**given, use_cache=False) if _caches(model) else model(**given)
        tensors = [v for v in torch.utils._pytree.tree_leaves(dict(expected)) if v is not None]
        found = outputs(program, (), given)
        assert_near(tensors, found, tolerance=2e-6, what="captured")  # another mask path, no more
        assert_near(found, outputs(result, (), given), tolerance=1e-4, what="simplified")


def _caches(model: Any) -> bool:
    return getattr(model.config, "use_cache", False) is True


def test_the_config_is_put_back() -> None:
    model, inputs = build("gpt2")
    assert model.config.use_cache is True
    program = capture(model, inputs(2, 0))
    assert program.coverage.is_whole
    assert model.config.use_cache is True
    given = inputs(2, 3)
    assert_same([model(**given, use_cache=False).logits.detach()], outputs(program, (), given), "")
