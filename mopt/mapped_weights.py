"""Weights of large models: over the mapped files themselves, so that they take no memory of mopt.

Pages of a mapped file are read when a value is used and may be dropped again at any time; they
count neither as anonymous memory nor against ``RLIMIT_DATA``. What is stored in another type than
it is computed in is converted a piece at a time into a temporary file, and that is mapped.
"""

from __future__ import annotations

import mmap
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mopt.safe_read import open_file
from mopt.safetensors_files import map_torch, read_header

_PIECE = 1 << 22
_ALIGNMENT = 64


def stored_elements(files: Iterable[Path]) -> int:
    """How many values safetensors files hold, by their headers."""
    total = 0
    for path in files:
        with open_file(path) as file:
            tensors = read_header(file).tensors.values()
            total += sum(torch.Size(info.shape).numel() for info in tensors)
    return total


def mapped_weights(files: Iterable[Path], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of safetensors files, floating point ones as ``dtype``, all of them read-only.

    Writing to one ends the process: they are for models that are only read.
    """
    found: dict[str, Tensor] = {}
    for path in files:
        found.update(map_torch(path))
    others = {
        name: tensor for name, tensor in found.items()
        if tensor.is_floating_point() and tensor.dtype != dtype
    }  # fmt: skip
    return {**found, **_converted(others, dtype)} if others else found


def _converted(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors as ``dtype`` in a file that has no name and is gone with the last of them."""
    starts: dict[str, int] = {}
    with tempfile.TemporaryFile(prefix="mopt-weights-") as file:
        for name, tensor in tensors.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            starts[name] = file.tell()
            flat = tensor.reshape(-1)
            for at in range(0, len(flat), _PIECE):
                piece = flat[at : at + _PIECE].to(dtype)
                file.write(memoryview(piece.view(torch.uint8).numpy()))
        file.write(bytes(_ALIGNMENT))
        file.flush()
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are read-only is known here
        return {
            name: torch.frombuffer(
                buffer, dtype=dtype, count=tensors[name].numel(), offset=start
            ).reshape(tensors[name].shape) if tensors[name].numel()
            else tensors[name].to(dtype)
            for name, start in starts.items()
        }  # fmt: skip
