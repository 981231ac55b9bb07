"""MODEL as a user names it: where the module, its inputs and its data come from.

    zoo:NAME                    a model that comes with mopt
    package.module:factory      a function that returns the model, found by import
    path/file.py:factory        the same in a file
    saved.pt2                   a file of torch.export.save; runs code from the file
    hf:DIRECTORY                a local Hugging Face folder

A factory returns a module, or a mapping with ``model``, ``example_inputs`` and, if there are any,
``dynamic_shapes``, ``calibration`` and ``evaluate``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopt.errors import InputError, UsageError, quote, unknown_name
from mopt.user_code import (
    GuardedBatches,
    Reference,
    find_object,
    guarded_function,
    nearest_file,
    parse_reference,
    user_errors,
)

if TYPE_CHECKING:
    from torch import nn

_KEYS = ("model", "example_inputs", "dynamic_shapes", "calibration", "evaluate")
_FORMS = "zoo:NAME, package.module:factory, file.py:factory, saved.pt2 or hf:DIRECTORY"
# Names that say nothing about the model: its file then gives the name.
_PLAIN_NAMES = {"factory", "build", "build_model", "make", "make_model", "create", "create_model",
                "get_model", "load_model", "model", "net", "main"}  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """A model with everything that was given along with it.

    ``example_inputs``, ``dynamic_shapes``, ``calibration`` and ``evaluate`` are what
    ``mopt.compile`` takes. ``trust_note`` says what code of somebody else was run to load it, and
    ``notes`` what the user should know about the model.
    """

    name: str
    model: nn.Module
    example_inputs: Any
    dynamic_shapes: Any = None
    calibration: Iterable[Any] | None = None
    evaluate: Callable[..., Any] | None = None
    trust_note: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceName:
    """What MODEL means, read without importing torch or running anything.

    ``kind`` is zoo, code, pt2 or hf; ``name`` is fit for a folder name.
    """

    kind: str
    name: str
    path: Path | None = None
    reference: Reference | None = None


def parse_source(text: str) -> SourceName:
    """Read MODEL and see that what it names exists.

    Raises UsageError (``bad-model``, ``bad-reference``, ``unknown-model``) or InputError
    (``file-not-found``, ``folder-not-found``).
    """
    kind, colon, rest = text.partition(":")
    if colon and kind == "zoo":
        names = [listing.name for listing in import_module("mopt.models").names()]
        if rest not in names:
            raise unknown_name("model", rest, names, "mopt models list")
        return SourceName("zoo", rest)
    if colon and kind == "hf":
        folder = Path(rest)
        if not rest or not folder.is_dir():
            raise InputError(
                f"no folder {quote(rest)}",
                code="folder-not-found",
                hint="hf: takes a local folder, nothing is downloaded; save the model there first "
                "with save_pretrained",
            )
        return SourceName("hf", _folder_name(folder.resolve().name), path=folder)
    if text.endswith(".pt2"):
        return SourceName("pt2", _folder_name(Path(text).stem), path=_existing(Path(text)))
    if not colon and not text.endswith(".py"):
        raise _not_a_model(text)
    reference = parse_reference(text, "factory")
    place = reference.file.stem if reference.file else reference.module.rpartition(".")[2]
    last = reference.name.rpartition(".")[2]
    return SourceName(
        "code", _folder_name(place if last.lower() in _PLAIN_NAMES else last), reference=reference
    )


def load_source(text: str, *, trust: bool = False, inputs: str | None = None) -> ModelSource:
    """The model that ``text`` names (see the top of this file), ready for ``mopt.compile``.

    ``inputs`` is an npz file with example inputs, named as the arguments of ``forward``; it
    replaces those that came with the model. A ``.pt2`` is loaded only with ``trust``: loading it
    runs code from the file. Raises what ``parse_source`` raises, and InputError or UsageError for a
    model that cannot be made, with the user's own frames.
    """
    source = parse_source(text)
    if source.kind == "pt2" and not trust:
        raise UsageError(
            f"loading {text} runs code that the file brings along, and it is not trusted",
            code="untrusted-file",
            hint="pass --trust if you or somebody you trust made it",
        )
    if source.kind == "zoo":
        found = _load_zoo(source.name)
    elif source.reference is not None:
        found = _load_code(source.name, source.reference)
    else:
        assert source.path is not None
        found = _load_hf(source.name, source.path) if source.kind == "hf" else _load_pt2(
            source.name, source.path)  # fmt: skip
    return _with_inputs(found, inputs)


def load_calibration(text: str, source: ModelSource) -> Iterable[Any]:
    """Calibration batches from an npz file, or from ``module:name`` or ``file.py:name``.

    The name is an iterable of inputs or a function that returns one. For npz files see
    ``mopt.input_files.read_batches``.
    """
    if text.endswith(".npz"):
        from mopt.input_files import read_batches

        return read_batches(text, source.model, source.example_inputs)
    found = find_object(parse_reference(text, "calibration data"), "calibration data")
    return _batches(found, text)


def load_evaluate(text: str) -> Callable[..., Any]:
    """The function ``evaluate(run)`` that ``module:name`` or ``file.py:name`` names."""
    found = find_object(parse_reference(text, "function"), "function")
    return _evaluate(found, text)


def check_data_reference(text: str, what: str) -> None:
    """See that a calibration or evaluation reference names something, before any work is done."""
    if text.endswith(".npz"):
        _existing(Path(text))
    else:
        parse_reference(text, what)


def _load_zoo(name: str) -> ModelSource:
    entry = import_module("mopt.models").load(name)
    return ModelSource(
        name=name,
        model=entry.build(),
        example_inputs=entry.example_inputs(),
        dynamic_shapes=entry.dynamic_shapes() if entry.dynamic_shapes else None,
        calibration=GuardedBatches(entry.calibration) if entry.calibration else None,
        evaluate=entry.evaluate,
    )


def _load_hf(name: str, folder: Path) -> ModelSource:
    from mopt.hf_folder import load_hf_folder

    model, examples, shapes, notes = load_hf_folder(folder)
    return ModelSource(name, model, examples, shapes, notes=notes)


def _load_pt2(name: str, path: Path) -> ModelSource:
    from mopt.pt2_file import load_pt2

    model, examples, shapes = load_pt2(path)
    note = f"loading {str(path)!r} ran code from the file"
    return ModelSource(name, model, examples, shapes, trust_note=note)


def _load_code(name: str, reference: Reference) -> ModelSource:
    from torch import nn

    found = find_object(reference, "factory")
    if not isinstance(found, nn.Module) and callable(found):
        with user_errors(f"factory {reference.text!r}", code="factory-failed"):
            found = found()
    if isinstance(found, Mapping):
        return _from_mapping(name, found, reference)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"factory {reference.text!r} returned {quote(found)}",
            code="bad-factory",
            hint="return a torch.nn.Module, or a dict with model and example_inputs",
        )
    # The second name is the one that Lightning modules use.
    examples = getattr(found, "example_inputs", getattr(found, "example_input_array", None))
    return ModelSource(name, found, examples)


def _from_mapping(name: str, found: Mapping[str, Any], reference: Reference) -> ModelSource:
    from torch import nn

    for key in found:
        if key not in _KEYS:
            raise unknown_name("factory key", str(key), _KEYS, f"see {reference.text}")
    model = found.get("model")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"factory {reference.text!r}: 'model' is "
            + (f"a {type(model).__name__}" if "model" in found else "missing"),
            code="bad-factory",
            hint='return {"model": module, "example_inputs": (tensor, ...)}',
        )
    calibration, evaluate = found.get("calibration"), found.get("evaluate")
    return ModelSource(
        name=name,
        model=model,
        example_inputs=found.get("example_inputs"),
        dynamic_shapes=found.get("dynamic_shapes"),
        calibration=None if calibration is None else _batches(calibration, reference.text),
        evaluate=None if evaluate is None else _evaluate(evaluate, reference.text),
    )


def _batches(found: Any, text: str) -> Iterable[Any]:
    if not callable(found) and not isinstance(found, Iterable):
        raise InputError(
            f"calibration data of {text!r} is a {type(found).__name__}",
            code="bad-calibration",
            hint="give an iterable of inputs, or a function that returns one",
        )
    batches = GuardedBatches(found)
    # Whoever reads it must be able to see that it can be read only once.
    return iter(batches) if isinstance(found, Iterator) else batches


def _evaluate(found: Any, text: str) -> Callable[..., Any]:
    if not callable(found):
        raise InputError(
            f"evaluate of {text!r} is a {type(found).__name__}",
            code="bad-evaluate",
            hint="give a function that takes the model as a callable and returns a number",
        )
    return guarded_function(found, f"evaluating with {text!r}", "evaluate-failed")


def _with_inputs(source: ModelSource, inputs: str | None) -> ModelSource:
    import torch

    if inputs is not None:
        from mopt.input_files import read_call

        return replace(source, example_inputs=read_call(inputs, source.model))
    examples = source.example_inputs
    if examples is None:
        raise InputError(
            f"{source.name}: the model came without example inputs",
            code="missing-example-inputs",
            hint='return {"model": model, "example_inputs": (tensor, ...)}, or pass --inputs '
            "FILE.npz with an array for each argument of forward",
        )
    if isinstance(examples, torch.Tensor):
        return replace(source, example_inputs=(examples,))
    if isinstance(examples, Mapping | list | tuple) and len(examples):
        return source
    raise InputError(
        f"{source.name}: example_inputs is {quote(examples)}",
        code="bad-example-inputs",
        hint="give a tuple of inputs, or a dict of keyword inputs",
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        near = nearest_file(path)
        raise InputError(
            f"no file {quote(str(path))}",
            code="file-not-found",
            hint=f"did you mean {near}?" if near else None,
        )
    return path


def _not_a_model(text: str) -> UsageError:
    hint = f"MODEL is {_FORMS}"
    names = [listing.name for listing in import_module("mopt.models").names()]
    if text in names:
        hint = f"did you mean zoo:{text}?"
    elif (Path(text) / "config.json").is_file():
        hint = f"did you mean hf:{text}?"
    elif Path(text).suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt"):
        hint = (
            "a file of weights is no model: write a factory that builds it and loads them; " + hint
        )
    return UsageError(f"{quote(text)} is not a model", code="bad-model", hint=hint)


def _folder_name(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:100]
    return name or "model"
