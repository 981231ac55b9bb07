"""safetensors from strangers are checked before use; ours are the library's, byte-stable."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from mopt.disk import FileWriter
from mopt.errors import InputError, InternalError, LimitError, MoptError
from mopt.limits import parse_limits
from mopt.safe_read import open_file
from mopt.safetensors_files import (
    count_nonfinite,
    read_header,
    read_numpy,
    read_torch,
    write_safetensors,
)


def save(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    with FileWriter(str(path), path.name) as writer:
        write_safetensors(writer, tensors, metadata)
    return path


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


TENSORS = {
    "half": np.arange(3, dtype=np.float16),
    "brain": np.arange(5).astype(ml_dtypes.bfloat16).reshape(5, 1),
    "fp8": np.arange(7).astype(ml_dtypes.float8_e4m3fn),
    "flag": np.array([True, False]),
    "scalar": np.array(2.5),
    "none": np.zeros((0, 4), np.float32),
    "big": np.arange(12, dtype=">i4").reshape(3, 4)[:, ::2],
    "wide": np.arange(3, dtype=np.uint64),
}


def test_every_type_goes_round_and_the_library_agrees(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", TENSORS, {"format": "pt"})
    ours = read_numpy(path)
    theirs = safetensors.torch.load_file(path)
    torches = read_torch(path)
    assert set(ours) == set(theirs) == set(torches) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert ours[name].shape == tensor.shape
        assert ours[name].dtype == tensor.dtype.newbyteorder("=")
        np.testing.assert_array_equal(ours[name], tensor)
        assert torch.equal(torches[name].float(), theirs[name].float())
        assert torches[name].dtype == theirs[name].dtype
    with open_file(path) as file:
        assert read_header(file).metadata == {"format": "pt"}


def test_torch_and_numpy_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    first = save(tmp_path / "a", {"w": torch.ones(2, 3).t(), "b": torch.ones(2).bfloat16()})
    second = save(
        tmp_path / "b", {"b": np.ones(2, ml_dtypes.bfloat16), "w": np.ones((3, 2), np.float32)}
    )
    assert first.read_bytes() == second.read_bytes()
    safetensors.torch.save_file(safetensors.torch.load_file(first), tmp_path / "c")
    assert first.read_bytes() == (tmp_path / "c").read_bytes(), "the order the library uses"


def test_mapped_reading(tmp_path: Path) -> None:
    path = save(tmp_path / "a", {"w": np.arange(4, dtype=np.float32)})
    before = path.read_bytes()
    array = read_numpy(path)["w"]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    tensor = read_torch(path)["w"]
    tensor[0] = 5
    assert path.read_bytes() == before, "writing to a tensor never reaches the file"
    assert read_torch(path)["w"][0] == 0


def test_unaligned_data_of_other_writers_is_read(tmp_path: Path) -> None:
    header = b' {"a":' + json.dumps(entry("F32", [2], 1, 9)).encode()
    header = header[1:] + b',"b":' + json.dumps(entry("U8", [1], 0, 1)).encode() + b"}"
    path = raw(tmp_path / "a", header, b"\1" + np.array([1, 2], np.float32).tobytes())
    assert read_torch(path)["a"].tolist() == [1, 2]
    assert read_numpy(path)["a"].tolist() == [1, 2]


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda p: raw(p, b""), "header"),
    "header longer than the file": (lambda p: raw(p, b"{}", length=50), "header"),
    "header of 2**63": (lambda p: raw(p, b"{}", length=2**63), "header"),
    "header that is a list": (lambda p: raw(p, [1]), "header"),
    "duplicate names": (lambda p: raw(p, b'{"a":1,"a":2}'), "json-duplicate-key"),
    "metadata with numbers": (lambda p: raw(p, {"__metadata__": {"a": 1}}), "header"),
    "unknown dtype": (lambda p: raw(p, {"a": entry("PICKLE", [1], 0, 4)}, b"1234"), "tensor"),
    "dtype that is a list": (lambda p: raw(p, {"a": entry([], [1], 0, 4)}, b"1234"), "tensor"),
    "negative size": (lambda p: raw(p, {"a": entry("F32", [-1], 0, 4)}, b"1234"), "tensor"),
    "fractional size": (lambda p: raw(p, {"a": entry("F32", [1.0], 0, 4)}, b"1234"), "tensor"),
    "boolean size": (lambda p: raw(p, {"a": entry("F32", [True], 0, 4)}, b"1234"), "tensor"),
    "size that overflows": (
        lambda p: raw(p, {"a": entry("F32", [2**32, 2**32, 2**32], 0, 4)}, b"1234"), "tensor"),
    "33 dimensions": (lambda p: raw(p, {"a": entry("U8", [1] * 33, 0, 1)}, b"1"), "tensor"),
    "wrong size": (lambda p: raw(p, {"a": entry("F32", [2], 0, 4)}, b"1234"), "tensor"),
    "offsets backwards": (lambda p: raw(p, {"a": entry("U8", [0], 4, 0)}, b"1234"), "tensor"),
    "three offsets": (lambda p: raw(p, {"a": entry("U8", [4], 0, 4, 4)}, b"1234"), "tensor"),
    "extra key": (
        lambda p: raw(p, {"a": {**entry("U8", [4], 0, 4), "file": "/etc/passwd"}}, b"1234"),
        "tensor"),
    "a hole": (
        lambda p: raw(p, {"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123"),
        "tensor"),
    "an overlap": (
        lambda p: raw(p, {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"),
        "tensor"),
    "the same bytes twice": (
        lambda p: raw(p, {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"12"),
        "tensor"),
    "data left over": (lambda p: raw(p, {"a": entry("U8", [1], 0, 1)}, b"12"), "header"),
    "data missing": (lambda p: raw(p, {"a": entry("U8", [3], 0, 3)}, b"12"), "header"),
    "control characters in a name": (
        lambda p: raw(p, {"a\x1b[2J": entry("U8", [0], 0, 0)}), "tensor"),
    "a name of 513": (lambda p: raw(p, {"a" * 513: entry("U8", [0], 0, 0)}), "tensor"),
    "no name": (lambda p: raw(p, {"": entry("U8", [0], 0, 0)}), "tensor"),
    "a bool of 2": (lambda p: raw(p, {"a": entry("BOOL", [2], 0, 2)}, b"\1\2"), "tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE, ids=lambda c: c)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    make, code = HOSTILE[case]
    path = make(tmp_path / "a.safetensors")
    for read in (read_numpy, read_torch):
        with pytest.raises(MoptError) as caught:
            read(path)
        assert caught.value.code in (code, f"safetensors-{code}")
        assert "a.safetensors" in caught.value.message and len(caught.value.message) < 400
        assert "\x1b" not in str(caught.value)


def test_limits(tmp_path: Path) -> None:
    path = save(tmp_path / "a", {f"t{i}": np.zeros(1) for i in range(5)})
    for setting in ("safetensors-tensors=4", "safetensors-header=100"):
        with pytest.raises(LimitError):
            read_numpy(path, limits=parse_limits([setting]))
    assert len(read_numpy(path, limits=parse_limits(["safetensors-tensors=5"]))) == 5


@pytest.mark.parametrize(
    ("expected", "match"),
    [
        ({"w": ("float32", (2, 2)), "b": ("float32", (2,))}, "lacks 'b'"),
        ({}, "holds 'w'"),
        ({"w": ("float32", (4,))}, r"is float32 \[2, 2\], expected 'float32' \[4\]"),
        ({"w": ("float16", (2, 2))}, "expected 'float16'"),
    ],
)
def test_what_the_manifest_does_not_say_is_refused(
    tmp_path: Path, expected: dict[str, tuple[str, tuple[int, ...]]], match: str
) -> None:
    path = save(tmp_path / "a", {"w": np.zeros((2, 2), np.float32)})
    with pytest.raises(InputError) as caught:
        read_numpy(path, expected=expected)
    assert caught.value.code == "safetensors-unexpected"
    assert re.search(match, caught.value.message)
    assert read_numpy(path, expected={"w": ("float32", (2, 2))})


def test_writing_refuses_what_cannot_be_stable(tmp_path: Path) -> None:
    with pytest.raises(InternalError):
        save(tmp_path / "a", {}, {"a": "1", "b": "2"})
    with pytest.raises(InputError, match="complex64"):
        save(tmp_path / "b", {"w": np.zeros(1, np.complex64)})


def test_nonfinite_values_are_counted() -> None:
    values = np.ones(3_000_000, np.float32)
    values[[0, 5, 2_999_999]] = [np.nan, np.inf, -np.inf]
    assert count_nonfinite(values.reshape(3, -1)) == 3
    assert count_nonfinite(values[1:3]) == 0
    assert count_nonfinite(np.array([1, 2])) == 0
    assert count_nonfinite(np.array([1, np.nan]).astype(ml_dtypes.bfloat16)) == 1
