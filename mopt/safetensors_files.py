"""safetensors files: read within limits and without copies, written with the same bytes each time.

The header is checked here before any byte of data is touched: names, types, counts, and that the
tensors cover the data exactly, without holes or overlap. Reading maps the file, so what is never
used is never loaded.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mopt.disk import FileWriter
from mopt.errors import InputError, InternalError, LimitError, quote
from mopt.json_files import parse_json
from mopt.limits import DEFAULT_LIMITS, Limits
from mopt.safe_read import OpenFile, open_file

if TYPE_CHECKING:
    import numpy as np
    import torch

# safetensors name -> (bytes per element, numpy name, torch name); numpy takes the 8-bit and
# brain floats from ml_dtypes.
_DTYPES = {
    "BOOL": (1, "bool", "bool"),
    "U8": (1, "uint8", "uint8"),
    "I8": (1, "int8", "int8"),
    "F8_E4M3": (1, "float8_e4m3fn", "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2", "float8_e5m2"),
    "U16": (2, "uint16", "uint16"),
    "I16": (2, "int16", "int16"),
    "F16": (2, "float16", "float16"),
    "BF16": (2, "bfloat16", "bfloat16"),
    "U32": (4, "uint32", "uint32"),
    "I32": (4, "int32", "int32"),
    "F32": (4, "float32", "float32"),
    "U64": (8, "uint64", "uint64"),
    "I64": (8, "int64", "int64"),
    "F64": (8, "float64", "float64"),
}
_BY_NAME = {numpy_name: code for code, (_, numpy_name, _) in _DTYPES.items()}
_LARGEST = 2**53


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a header; ``start`` and ``stop`` count from the first byte of data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says it holds, checked; ``data_start`` is a file offset."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(file: OpenFile, *, limits: Limits = DEFAULT_LIMITS) -> SafetensorsHeader:
    """The checked header of a safetensors file.

    Raises the file's error class (``safetensors-header``, ``safetensors-tensor``) or LimitError.
    """
    name = file.name
    if file.size < 8:
        raise file.error(f"{name} is too short for safetensors", code="safetensors-header")
    length = int.from_bytes(file.read_at(0, 8), "little")
    if length > limits.safetensors_header:
        raise LimitError(
            f"{name} claims a header of {length} bytes, at most {limits.safetensors_header} are "
            "read",
            code="safetensors-header",
        )
    if length > file.size - 8:
        raise file.error(
            f"{name} claims a header of {length} bytes and has {file.size - 8}",
            code="safetensors-header",
        )
    raw = file.read_at(8, length)
    if not raw.startswith(b"{"):
        raise file.error(f"{name} has no safetensors header", code="safetensors-header")
    entries = parse_json(
        raw,
        name=f"the header of {name}",
        limits=limits,
        max_bytes=limits.safetensors_header,
        max_values=limits.safetensors_tensors * 16,
        error=file.error,
    )
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise file.error(f"{name}: __metadata__ is not text", code="safetensors-header")
    if len(entries) > limits.safetensors_tensors:
        raise LimitError(
            f"{name} holds {len(entries)} tensors, at most {limits.safetensors_tensors} are read",
            code="safetensors-header",
        )
    tensors = {key: _tensor_info(file, key, entry, limits) for key, entry in entries.items()}
    _check_cover(file, tensors, file.size - 8 - length)
    return SafetensorsHeader(tensors, metadata, 8 + length)


def _tensor_info(file: OpenFile, key: str, entry: Any, limits: Limits) -> TensorInfo:
    def refuse(what: str) -> Exception:
        return file.error(f"{file.name}: tensor {quote(key)} {what}", code="safetensors-tensor")

    if not 1 <= len(key) <= limits.safetensors_name or not key.isprintable():
        raise refuse("has a name that is too long or not printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise refuse(f"has the unknown dtype {quote(dtype)}")
    if not _counts(shape) or len(shape) > limits.tensor_rank:
        raise refuse(f"has the shape {quote(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"has the offsets {quote(offsets)}")
    size = math.prod(shape) * _DTYPES[dtype][0]
    if size > _LARGEST or offsets[1] - offsets[0] != size:
        raise refuse(f"of {dtype} {quote(shape)} needs {size} bytes, has {quote(offsets)}")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_cover(file: OpenFile, tensors: Mapping[str, TensorInfo], size: int) -> None:
    end = 0
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise file.error(
                f"{file.name}: tensor {quote(key)} starts at byte {info.start}, expected {end}",
                code="safetensors-tensor",
            )
        end = info.stop
    if end != size:
        raise file.error(
            f"{file.name} has {size} bytes of data, its tensors need {end}",
            code="safetensors-header",
        )


def read_numpy(
    source: OpenFile | str | os.PathLike[str],
    *,
    expected: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> dict[str, np.ndarray]:
    """Every tensor as a read-only numpy view of the mapped file, in the header's order.

    ``expected`` gives (numpy dtype name, shape) of each tensor; a difference is an error
    (``safetensors-unexpected``). 8-bit and brain floats come as ml_dtypes types.
    """
    import numpy as np

    result = {}
    header, buffer = _load(source, expected, limits, private_copy=False)
    for key, info in header.tensors.items():
        count, dtype = math.prod(info.shape), _numpy_dtype(info.dtype)
        if buffer is None or not count:
            array = np.zeros(count, dtype)
        else:
            array = np.frombuffer(buffer, dtype, count, header.data_start + info.start)
        array.flags.writeable = False
        result[key] = array.reshape(info.shape)
    return result


def read_torch(
    source: OpenFile | str | os.PathLike[str],
    *,
    expected: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> dict[str, torch.Tensor]:
    """Every tensor as a torch tensor on the CPU, in the header's order.

    They share a private mapping of the file: memory is taken when a value is used, and writing to
    one never reaches the file. ``expected`` is as for ``read_numpy``.
    """
    return _read_torch(source, expected, limits, private_copy=True)


def map_torch(
    source: OpenFile | str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS
) -> dict[str, torch.Tensor]:
    """As ``read_torch``, over a mapping that is read-only: writing to a tensor ends the process.

    Such pages never become memory of their own, whatever is done with the tensors.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are read-only is known here
        return _read_torch(source, None, limits, private_copy=False)


def _read_torch(
    source: OpenFile | str | os.PathLike[str],
    expected: Mapping[str, tuple[str, tuple[int, ...]]] | None,
    limits: Limits,
    private_copy: bool,
) -> dict[str, torch.Tensor]:
    import torch

    result = {}
    header, buffer = _load(source, expected, limits, private_copy)
    for key, info in header.tensors.items():
        count, (width, _, name) = math.prod(info.shape), _DTYPES[info.dtype]
        dtype, offset = getattr(torch, name), header.data_start + info.start
        if buffer is None or not count:
            tensor = torch.empty(count, dtype=dtype)
        elif offset % width:
            copied = bytearray(buffer[offset : offset + count * width])
            tensor = torch.frombuffer(copied, dtype=dtype)
        else:
            tensor = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
        result[key] = tensor.reshape(info.shape)
    return result


def _load(
    source: OpenFile | str | os.PathLike[str],
    expected: Mapping[str, tuple[str, tuple[int, ...]]] | None,
    limits: Limits,
    private_copy: bool,
) -> tuple[SafetensorsHeader, mmap.mmap | None]:
    if not isinstance(source, OpenFile):
        with open_file(source) as file:
            return _load(file, expected, limits, private_copy)
    header = read_header(source, limits=limits)
    if expected is not None:
        _check_expected(source, header, expected)
    if source.size == header.data_start:
        return header, None
    buffer = source.map(private_copy=private_copy)
    for key, info in header.tensors.items():
        if info.dtype == "BOOL":
            _check_bool(source, key, buffer, header.data_start + info.start, info)
    return header, buffer


def _check_bool(file: OpenFile, key: str, buffer: mmap.mmap, start: int, info: TensorInfo) -> None:
    # Any other byte in a bool tensor is undefined behaviour in the kernels that read it.
    if buffer[start : start + info.stop - info.start].strip(b"\x00\x01"):
        raise file.error(
            f"{file.name}: tensor {quote(key)} is BOOL and holds other bytes than 0 and 1",
            code="safetensors-tensor",
        )


def _check_expected(
    file: OpenFile,
    header: SafetensorsHeader,
    expected: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    missing = sorted(set(expected) - set(header.tensors))
    extra = sorted(set(header.tensors) - set(expected))
    if missing or extra:
        what = f"lacks {quote(missing[0])}" if missing else f"holds {quote(extra[0])} beyond it"
        raise file.error(
            f"{file.name} is not what the manifest says: it {what} "
            f"({len(missing)} missing, {len(extra)} unexpected)",
            code="safetensors-unexpected",
        )
    for key, (dtype, shape) in expected.items():
        info = header.tensors[key]
        found = _DTYPES[info.dtype][1]
        if found != dtype or info.shape != tuple(shape):
            raise file.error(
                f"{file.name}: tensor {quote(key)} is {found} {quote(list(info.shape))}, "
                f"expected {quote(dtype)} {quote(list(shape))}",
                code="safetensors-unexpected",
            )


def _numpy_dtype(code: str) -> np.dtype:
    import numpy as np

    name = _DTYPES[code][1]
    if code in ("BF16", "F8_E4M3", "F8_E5M2"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def count_nonfinite(array: np.ndarray) -> int:
    """How many values of a numeric array are NaN or infinite, looking at a slice at a time."""
    import numpy as np

    if array.dtype.kind in "biu":
        return 0
    flat = array.reshape(-1)
    step = 1 << 20
    return sum(
        int(np.count_nonzero(~np.isfinite(flat[i : i + step]))) for i in range(0, flat.size, step)
    )


def write_safetensors(
    writer: FileWriter,
    tensors: Mapping[str, np.ndarray | torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write numpy or torch tensors as safetensors, one at a time; equal input, equal bytes.

    Wide types come first, then names in order, so every tensor is aligned to its type. At most one
    metadata key is taken: readers and writers elsewhere keep several in random order.
    """
    if metadata and len(metadata) > 1:
        raise InternalError("safetensors metadata takes one key", code="safetensors-metadata")
    codes = {key: _code_of(key, tensor) for key, tensor in tensors.items()}
    order = sorted(tensors, key=lambda key: (-_DTYPES[codes[key]][0], key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        shape = [int(n) for n in tensors[key].shape]
        start, end = end, end + math.prod(shape) * _DTYPES[codes[key]][0]
        header[key] = {"dtype": codes[key], "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    writer.write(len(raw).to_bytes(8, "little") + raw)
    for key in order:
        writer.write(_raw_bytes(tensors[key]))


def _code_of(key: str, tensor: Any) -> str:
    # numpy's own name leaves out the byte order, which is settled when the bytes are written.
    name = getattr(tensor.dtype, "name", str(tensor.dtype).removeprefix("torch."))
    if name not in _BY_NAME:
        raise InputError(
            f"tensor {quote(key)} has the type {name}, which safetensors cannot hold",
            code="safetensors-tensor",
        )
    return _BY_NAME[name]


def _raw_bytes(tensor: Any) -> memoryview:
    import numpy as np

    if not isinstance(tensor, np.ndarray):
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data
    little = tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8).data
