"""A local Hugging Face folder as a module with example inputs. Nothing is downloaded.

Weights are read from safetensors only, and code in the folder is never run.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopt.errors import InputError, UsageError, quote
from mopt.json_files import read_json
from mopt.mapped_weights import mapped_weights, stored_elements
from mopt.safe_read import check_name, open_file
from mopt.safetensors_files import read_header

SEQUENCE = 128
# Weights that take more than this as float32 stay in their files.
MAPPED_FROM_BYTES = 1 << 30
_DECODER_SEQUENCE = 32
_AUDIO_SAMPLES = 16_000
_MODULES = "modules.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_hf_folder(
    folder: Path,
) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, Any], tuple[str, ...]]:
    """The model, example inputs by name, dynamic shapes, and notes for the user.

    Outputs are a dict of named tensors; caches of decoders are off. In the examples the batch is 1
    and a text is 128 tokens long; both may vary afterwards. Of a sentence-transformers folder the
    transformer is taken. Raises UsageError ``missing-package`` without transformers, InputError for
    a folder that is no model, or that needs pickles or code of its own.
    """
    transformers = _transformers()
    place, others = _model_folder(folder)
    config_data = _read_table(place / "config.json")
    files = _check_weights(place)
    with _quiet(transformers):
        config = _load_config(transformers, place, config_data)
        cls = _class_of(transformers, config_data, place)
        model, notes = _load_weights(cls, config, place, files)
    if others:
        notes.append(
            f"{_MODULES} also names {', '.join(others)}: the artifact ends before them, "
            "apply them to its last_hidden_state"
        )
    model.eval()
    examples = _example_inputs(model, config)
    _give_plain_outputs(model)
    return model, examples, _dynamic_shapes(examples), tuple(notes)


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UsageError(
            "hf: models need the package 'transformers', which is not installed",
            code="missing-package",
            hint="pip install 'mopt[hf]'",
        ) from error
    return transformers


def _model_folder(folder: Path) -> tuple[Path, list[str]]:
    """Where the transformer lies, and the sentence-transformers modules that come after it."""
    place, others = folder, []
    if (folder / _MODULES).is_file():
        with open_file(folder / _MODULES) as file:
            listed = read_json(file)
        entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
        for entry in entries:
            kind = str(entry.get("type", "")).rpartition(".")[2]
            if kind != "Transformer":
                others.append(kind)
            elif entry.get("path"):
                place = folder.joinpath(*check_name(entry["path"], where=_MODULES))
    if not (place / "config.json").is_file():
        raise InputError(
            f"{quote(str(place))} holds no config.json",
            code="not-a-hf-folder",
            hint="give the folder that save_pretrained wrote",
        )
    return place, others


def _check_weights(place: Path) -> list[Path]:
    """The files of the weights: sound safetensors that lie in the folder, or links from it."""
    names = [_WEIGHTS] if (place / _WEIGHTS).is_file() else []
    if not names and (place / _INDEX).is_file():
        shards = _read_table(place / _INDEX).get("weight_map")
        names = sorted(set(shards.values())) if isinstance(shards, dict) else []
    files = [place.joinpath(*check_name(name, where=_INDEX)) for name in names]
    for path in files:
        with open_file(path) as file:
            read_header(file)
    if files:
        return files
    pickles = sorted(p.name for p in place.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise InputError(
            f"{quote(str(place))} holds its weights as pickle ({pickles[0]}), "
            "which can run code when it is read",
            code="pickled-weights",
            hint="if you trust it, convert it once: AutoModel.from_pretrained(folder)"
            ".save_pretrained(new_folder)",
        )
    raise InputError(f"{quote(str(place))} holds no {_WEIGHTS}", code="missing-weights")


def _read_table(path: Path) -> dict[str, Any]:
    with open_file(path) as file:
        data = read_json(file)
    if not isinstance(data, dict):
        raise InputError(f"{quote(str(path))} is not a table", code="not-a-hf-folder")
    return data


def _load_config(transformers: Any, place: Path, data: Mapping[str, Any]) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            place, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise InputError(
            f"transformers {transformers.__version__} cannot read the configuration "
            f"(model_type {quote(data.get('model_type'))}): {_first_line(error)}",
            code="unknown-architecture",
            hint=_own_code_hint(data),
        ) from error


def _class_of(transformers: Any, data: Mapping[str, Any], place: Path) -> Any:
    names = data.get("architectures") or []
    for name in names:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if not names:
        return transformers.AutoModel
    raise InputError(
        f"transformers {transformers.__version__} has no {quote(names[0])}, "
        f"which {quote(str(place))} asks for",
        code="unknown-architecture",
        hint=_own_code_hint(data),
    )


def _own_code_hint(data: Mapping[str, Any]) -> str:
    if "auto_map" in data:
        return (
            "the folder brings its own Python code, which mopt never runs; write a factory that "
            "loads the model and pass it as file.py:factory"
        )
    return "install the version of transformers that the model needs"


def _load_weights(
    cls: Any, config: Any, place: Path, files: list[Path]
) -> tuple[nn.Module, list[str]]:
    # Named here, because a configuration may ask for a kernel that is fetched from a hub.
    attention = "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"
    # Large models are computed with over their mapped files; the library itself maps them in a way
    # that counts as memory of this process.
    large = 4 * stored_elements(files) >= MAPPED_FROM_BYTES
    source: dict[str, Any] = {"state_dict": mapped_weights(files)} if large else {}
    try:
        model, found = cls.from_pretrained(
            None if large else place, config=config, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, dtype=torch.float32, output_loading_info=True,
            attn_implementation=attention, **source,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InputError(
            f"transformers cannot load {quote(str(place))}: {_first_line(error)}",
            code="hf-load-failed",
            hint="see that the folder is complete and its weights fit its config.json",
        ) from error
    notes = []
    missing = sorted(found.get("missing_keys", ()))
    if missing:
        notes.append(
            f"{len(missing)} weights are not in the folder and are random now, for example "
            f"{missing[0]}: outputs that depend on them mean nothing"
        )
    return model, notes


def _example_inputs(model: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    """What the forward of a model of this kind takes, at a usual size, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if main in ("pixel_values", "input_features", "input_values"):
        inputs = {main: _signal(main, config, generator)}
    else:
        inputs = _text(_text_config(config), takes, generator)
        vision = getattr(config, "vision_config", None)
        if vision is not None and "pixel_values" in takes and not _is_generative(config):
            inputs["pixel_values"] = _signal("pixel_values", vision, generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        text = _text_config(config)
        length = min(_DECODER_SEQUENCE, _positions(text))
        inputs["decoder_input_ids"] = _tokens(text, length, generator)
    return inputs


def _is_generative(config: Any) -> bool:
    # Models that write about images want as many image tokens in the text as patches; text alone
    # is a valid input for them.
    return any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))


def _text_config(config: Any) -> Any:
    return getattr(config, "text_config", None) or config


def _text(
    config: Any, takes: Mapping[str, Any], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": _tokens(config, min(SEQUENCE, _positions(config)), generator)}
    shape = inputs["input_ids"].shape
    if "attention_mask" in takes:
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    is_encoder = not getattr(config, "is_decoder", False)
    if "token_type_ids" in takes and is_encoder and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    return inputs


def _positions(config: Any) -> int:
    """How long a text may be; RoBERTa and its kin count from the padding token on."""
    for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            offset = (config.pad_token_id or 0) + 1 if _counts_from_padding(config) else 0
            return value - offset
    return SEQUENCE


def _counts_from_padding(config: Any) -> bool:
    return any(part in config.model_type for part in ("roberta", "camembert", "mpnet", "esm"))


def _tokens(config: Any, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random words, none of them special: the largest special token is left out as well."""
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep")]
    low = max([i for i in special if isinstance(i, int) and i < config.vocab_size // 2] or [-1]) + 1
    return torch.randint(low, config.vocab_size, (1, length), generator=generator)


def _signal(name: str, config: Any, generator: torch.Generator) -> torch.Tensor:
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape: tuple[int, ...] = (1, getattr(vision, "num_channels", 3), height, width)
    elif name == "input_features":
        # Whisper's convolutions halve the number of frames.
        shape = (1, getattr(config, "num_mel_bins", 80),
                 2 * getattr(config, "max_source_positions", 1500))  # fmt: skip
    else:
        shape = (1, _AUDIO_SAMPLES)
    return torch.randn(shape, generator=generator)


def _dynamic_shapes(examples: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Batch everywhere and the length of texts; images and sound keep their size."""
    auto = torch.export.Dim.AUTO
    return {
        name: {0: auto, 1: auto} if value.dtype == torch.int64 and value.dim() == 2 else {0: auto}
        for name, value in examples.items()
    }


def _plain_forward(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    # Also tells capture that texts and their masks vary together, not each by itself.
    for name in ("attention_mask", "token_type_ids"):
        if name in inputs and inputs[name].shape != inputs["input_ids"].shape:
            raise ValueError(f"{name} has another shape than input_ids")
    outputs = type(model).forward(model, **inputs, **options)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def _give_plain_outputs(model: Any) -> None:
    """Let the model return a plain dict of its named tensors, without caches.

    The forward of this one object is replaced instead of wrapping it in another module, so the
    layers keep the names that the user knows.
    """
    takes = inspect.signature(model.forward)
    options = {"return_dict": True}
    if "use_cache" in takes.parameters:
        options["use_cache"] = False
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False

    def forward(self: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return _plain_forward(self, dict(takes.bind(*args, **kwargs).arguments), options)

    forward.__signature__ = takes.replace(  # type: ignore[attr-defined]
        parameters=[
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(p for p in takes.parameters.values() if p.kind is not p.VAR_KEYWORD),
        ],
        return_annotation=inspect.Signature.empty,
    )
    # A bound method, so that a copy of the model calls its own weights.
    model.forward = types.MethodType(forward, model)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep the library's bars and advice, which its users see elsewhere, off the screen."""
    logger = logging.getLogger("transformers")
    level = logger.level
    had_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            transformers.utils.logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
