"""Inputs of a model from npz files: one call, or many batches for calibration.

Arrays are named as the model's inputs; a model with one input takes any name. Numbers are converted
to the dtype the model expects when nothing but precision can be lost (float64 to float32, int64 to
int32); anything else is an error.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import nn

from mopt.errors import InputError, quote
from mopt.npz_files import read_npz
from mopt.signature import Signature

_NUMBERED = re.compile(r"(?P<name>.+)\.(?P<index>\d{1,6})")
_WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def read_call(path: str | os.PathLike[str], model: nn.Module) -> dict[str, torch.Tensor]:
    """One set of keyword inputs for ``model`` from the arrays of an npz file.

    Raises InputError for arrays that ``forward`` does not take or that it needs and are missing.
    """
    arrays = read_npz(path)
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in named if p.default is p.empty]
    if len(arrays) == 1 and len(needed) == 1 and next(iter(arrays)) not in needed:
        return {needed[0]: torch.from_numpy(next(iter(arrays.values())))}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    _check_names(arrays, needed, None if takes_any else [p.name for p in named], path)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def read_batches(
    path: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
) -> list[Any]:
    """Calibration batches from an npz file, in the form of ``example_inputs``.

    Three layouts are understood, told apart by names and number of dimensions:

    - ``x`` with the example's dimensions: samples along the first axis, cut into batches as large
      as the example's (an incomplete last one is left out);
    - ``x`` with one dimension more: batches along the first axis;
    - ``x.0``, ``x.1`` ...: one array a batch, of any size.

    Raises InputError saying which array does not fit, and how.
    """
    arrays = read_npz(path)
    names, examples = _named_examples(model, example_inputs)
    if len(names) == 1:
        arrays = {_with_name(name, names[0]): array for name, array in arrays.items()}
    numbered = {name: _NUMBERED.fullmatch(name) for name in arrays if name not in names}
    if arrays and len(numbered) == len(arrays) and all(numbered.values()):
        batches = _numbered_batches(arrays, names, examples, path)
    else:
        _check_names(arrays, names, names, path)
        batches = _stacked_batches(arrays, names, examples, path)
    if isinstance(example_inputs, Mapping):
        return batches
    return [tuple(batch[name] for name in names) for batch in batches]


def read_flat(path: str | os.PathLike[str], signature: Signature) -> list[torch.Tensor]:
    """The input tensors of a lowered model, in signature order, from an npz file."""
    arrays = read_npz(path)
    names = [spec.name for spec in signature.inputs]
    if len(names) == 1 and len(arrays) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    _check_names(arrays, names, names, path)
    return [
        convert(arrays[spec.name], getattr(torch, spec.dtype), spec.name)
        for spec in signature.inputs
    ]


def convert(array: np.ndarray, dtype: torch.dtype, name: str) -> torch.Tensor:
    """An array as a tensor of ``dtype``; InputError when more than precision would be lost."""
    tensor = torch.from_numpy(array)
    if tensor.dtype == dtype:
        return tensor
    both_float = tensor.is_floating_point() and dtype.is_floating_point
    if both_float or (tensor.dtype in _WHOLE_NUMBERS and dtype in _WHOLE_NUMBERS):
        converted = tensor.to(dtype)
        if both_float or torch.equal(converted.to(tensor.dtype), tensor):
            return converted
    wanted = str(dtype).removeprefix("torch.")
    raise InputError(
        f"array {quote(name)} is {array.dtype}, the model takes {wanted}",
        code="input-dtype",
        hint=f"save it as {wanted}",
    )


def _named_examples(
    model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any]
) -> tuple[list[str], list[torch.Tensor]]:
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, Mapping):
        names, examples = list(example_inputs), list(example_inputs.values())
    else:
        examples = list(example_inputs)
        known = [
            p.name
            for p in inspect.signature(model.forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        names = known[: len(examples)]
        names += [f"input_{i}" for i in range(len(names), len(examples))]
    for name, example in zip(names, examples, strict=True):
        if not isinstance(example, torch.Tensor):
            raise InputError(
                f"input {quote(name)} of the model is a {type(example).__name__}, "
                "which an npz file cannot hold",
                code="input-structure",
                hint="give calibration data as module:function or file.py:function",
            )
    return names, examples


def _with_name(name: str, wanted: str) -> str:
    match = _NUMBERED.fullmatch(name)
    return f"{wanted}.{match['index']}" if match else wanted


def _stacked_batches(
    arrays: Mapping[str, np.ndarray],
    names: list[str],
    examples: list[torch.Tensor],
    path: str | os.PathLike[str],
) -> list[dict[str, torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for name, example in zip(names, examples, strict=True):
        array = arrays[name]
        if array.ndim == example.dim() + 1:
            pieces = [array[i] for i in range(array.shape[0])]
        elif array.ndim == example.dim() and array.ndim:
            size = example.shape[0]
            pieces = [array[i * size : (i + 1) * size] for i in range(array.shape[0] // size)]
            if not pieces:
                raise InputError(
                    f"{os.fspath(path)}: {quote(name)} holds {array.shape[0]} samples, "
                    f"one batch takes {size}",
                    code="calibration-empty",
                )
        else:
            raise InputError(
                f"{os.fspath(path)}: {quote(name)} has shape {array.shape}, the model takes "
                f"{tuple(example.shape)}",
                code="calibration-shape",
                hint="stack samples along the first axis, or batches along one more axis in front",
            )
        found[name] = [convert(piece, example.dtype, name) for piece in pieces]
    counts = {name: len(pieces) for name, pieces in found.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {number}" for name, number in counts.items())
        raise InputError(
            f"{os.fspath(path)}: inputs have different numbers of batches: {listed}",
            code="calibration-shape",
        )
    number = min(counts.values(), default=0)
    return [{name: found[name][i] for name in names} for i in range(number)]


def _numbered_batches(
    arrays: Mapping[str, np.ndarray],
    names: list[str],
    examples: list[torch.Tensor],
    path: str | os.PathLike[str],
) -> list[dict[str, torch.Tensor]]:
    batches: dict[int, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        match = _NUMBERED.fullmatch(name)
        assert match is not None, name
        batches.setdefault(int(match["index"]), {})[match["name"]] = array
    result = []
    for _, batch in sorted(batches.items()):
        _check_names(batch, names, names, path)
        result.append({
            name: convert(batch[name], example.dtype, name)
            for name, example in zip(names, examples, strict=True)
        })  # fmt: skip
    return result


def _check_names(
    found: Mapping[str, Any],
    needed: Sequence[str],
    allowed: Sequence[str] | None,
    path: str | os.PathLike[str],
) -> None:
    missing = [name for name in needed if name not in found]
    unknown = [name for name in found if allowed is not None and name not in allowed]
    if not missing and not unknown:
        return
    said = []
    if missing:
        said.append(f"lacks {', '.join(map(quote, missing))}")
    if unknown:
        said.append(f"has {', '.join(map(quote, unknown))}, which the model does not take")
    near = [get_close_matches(name, found, n=1) for name in missing]
    close = next((match[0] for match in near if match), None)
    known = ", ".join(allowed if allowed is not None else needed)
    raise InputError(
        f"{os.fspath(path)} {' and '.join(said)}",
        code="input-names",
        hint=f"rename {close!r}; the inputs are: {known}" if close else f"the inputs are: {known}",
    )


def nest_inputs(
    signature: Signature, flat: Sequence[torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of a lowered model from its flat tensors."""
    positional = replace(signature, result={"tuple": list(signature.args)})
    keyword = replace(signature, result={"dict": dict(signature.kwargs)})
    return positional.unflatten(flat), dict(keyword.unflatten(flat))


def named_arrays(outputs: Any) -> dict[str, np.ndarray]:
    """The tensors of a model's outputs as arrays, named by where they are in their nesting.

    A lone tensor is ``output_0``, items of a tuple ``output_0``, ``output_1``, entries of a mapping
    have their keys; deeper ones are joined with dots. Numbers that numpy lacks become float32.
    """
    found: dict[str, np.ndarray] = {}
    _name_arrays(outputs, "", found)
    return found


def _name_arrays(value: Any, path: str, found: dict[str, np.ndarray]) -> None:
    if isinstance(value, torch.Tensor | np.ndarray):
        tensor = torch.as_tensor(value).detach()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        found[path or "output_0"] = tensor.cpu().numpy()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _name_arrays(item, f"{path}.{key}" if path else str(key), found)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _name_arrays(item, f"{path}.{index}" if path else f"output_{index}", found)
