"""npz and npy files: read within limits, never unpickled, never extracted to disk.

A megabyte of npz can hold a gigabyte of zeros, so what comes out is counted while it is inflated.
Array headers are matched against the one form numpy writes instead of being evaluated.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING

import numpy as np

from mopt.errors import LimitError, quote
from mopt.files import atomic_file
from mopt.limits import DEFAULT_LIMITS, Limits
from mopt.safe_read import OpenFile, check_names, open_file

if TYPE_CHECKING:
    from mopt.errors import MoptError

_HEADER = re.compile(
    rb"\{'descr': '([<>|=][biuf][1248])', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,19}, ?)*\d{0,19})\), \} *\n"
)
# What zipfile lets out for damaged archives: found by mutating files, see the test. It raises
# NotImplementedError for a compression or version it does not know.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)
_CHUNK = 1 << 20
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_BYTES = 20
_DIRECTORY_BYTES_EACH = 1024


def read_npz(
    source: OpenFile | str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS
) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name, in the file's order, in native byte order.

    Raises the file's error class (``npz-format``, ``npz-member``, ``npy-header``) or LimitError
    (``npz-too-large``): see ``npz_members``, ``input_bytes`` and ``inflate_ratio`` of Limits.
    """
    if not isinstance(source, OpenFile):
        with open_file(source) as file:
            return read_npz(file, limits=limits)
    _check_directory(source, limits)
    result: dict[str, np.ndarray] = {}
    try:
        with (
            open(os.dup(source.fd), "rb") as stream,  # noqa: PTH123 a handle, not a path
            zipfile.ZipFile(stream) as archive,
        ):
            members = archive.infolist()
            _check_members(source, members, limits)
            budget = limits.input_bytes
            for member in members:
                with archive.open(member) as stream_of_member:
                    array = _read_array(stream_of_member, member.filename, source, budget)
                budget -= array.nbytes
                result[member.filename.removesuffix(".npy")] = array
    except _ZIP_ERRORS as e:
        raise source.error(f"{source.name} is not a sound npz file: {e}", code="npz-format") from e
    return result


def read_npy(
    source: OpenFile | str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS
) -> np.ndarray:
    """The array of one npy file; errors as for ``read_npz``."""
    if not isinstance(source, OpenFile):
        with open_file(source) as file:
            return read_npy(file, limits=limits)
    with open(os.dup(source.fd), "rb") as stream:  # noqa: PTH123 a handle, not a path
        return _read_array(stream, source.name, source, min(limits.input_bytes, source.size))


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to an npz file, complete or not at all; equal arrays give equal bytes."""
    with (
        atomic_file(path) as writer,
        zipfile.ZipFile(writer, "w") as archive,
    ):
        for name, array in arrays.items():
            # A fixed date, the oldest zip knows, so that equal arrays give equal bytes.
            member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)


def _check_directory(file: OpenFile, limits: Limits) -> None:
    """Bound the list of members before ``zipfile`` reads it into memory."""
    if file.size < _END.size or file.read_at(0, 2) != b"PK":
        raise file.error(f"{file.name} is not an npz file", code="npz-format")
    end_at = file.size - _END.size
    magic, _, _, _, count, size, _, comment = _END.unpack(file.read_at(end_at, _END.size))
    if magic != b"PK\5\6" or comment:
        raise file.error(f"{file.name} has something after its list of members", code="npz-format")
    wide_at = end_at - _LOCATOR_BYTES - _END64.size
    if wide_at > 0:
        wide = _END64.unpack(file.read_at(wide_at, _END64.size))
        if wide[0] == b"PK\6\6":
            count, size = max(count, wide[7]), max(size, wide[8])
    if count > limits.npz_members or size > limits.npz_members * _DIRECTORY_BYTES_EACH:
        raise LimitError(
            f"{file.name} lists {count} members in {size} bytes, at most {limits.npz_members} "
            "are read",
            code="npz-too-large",
        )


def _check_members(file: OpenFile, members: list[zipfile.ZipInfo], limits: Limits) -> None:
    if len(members) > limits.npz_members:
        raise LimitError(
            f"{file.name} holds {len(members)} members, at most {limits.npz_members} are read",
            code="npz-too-large",
        )
    for member in members:
        plain = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not plain or member.flag_bits & 1 or not member.filename.endswith(".npy"):
            raise file.error(
                f"{file.name}: {quote(member.filename)} is not a stored or deflated array",
                code="npz-member",
            )
    check_names((m.filename.removesuffix(".npy") for m in members), where=file.name, limits=limits)
    real = sum(member.file_size for member in members)
    stored = max(sum(member.compress_size for member in members), 1)
    if real > limits.input_bytes:
        raise LimitError(
            f"{file.name} holds {real} bytes, at most {limits.input_bytes} are read",
            code="npz-too-large",
            hint="raise it with --limit input-bytes=...",
        )
    if real > limits.inflate_free and real > limits.inflate_ratio * min(stored, file.size):
        raise LimitError(
            f"{file.name} would grow from {min(stored, file.size)} to {real} bytes",
            code="npz-too-large",
            hint="write it with numpy.savez, without compression",
        )


def _read_array(stream: IO[bytes], member: str, file: OpenFile, budget: int) -> np.ndarray:
    def refuse(what: str) -> MoptError:
        return file.error(f"{file.name}: {quote(member)} {what}", code="npy-header")

    magic = stream.read(8)
    if len(magic) < 8 or not magic.startswith(b"\x93NUMPY") or magic[6] not in (1, 2, 3):
        raise refuse("is not a numpy array")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > 10_000:
        raise refuse(f"has a header of {length} bytes")
    header = _HEADER.fullmatch(stream.read(length))
    if header is None:
        raise refuse("is not a plain array of numbers")
    kind = header[1].decode()
    try:
        dtype = np.dtype(kind)
    except TypeError as e:
        raise refuse(f"has values of type {quote(kind)}") from e
    shape = tuple(int(n) for n in header[3].replace(b" ", b"").split(b",") if n)
    if len(shape) > 32:
        raise refuse(f"has {len(shape)} dimensions")
    size = math.prod(shape) * dtype.itemsize
    if size > budget:
        raise LimitError(
            f"{file.name}: {quote(member)} claims {size} bytes, at most {budget} are left",
            code="npz-too-large",
        )
    # Filled as it comes, so that a false claim costs what the file holds and not what it says.
    data = bytearray()
    while len(data) < size and (chunk := stream.read(min(_CHUNK, size - len(data)))):
        data += chunk
    if len(data) != size or stream.read(1):
        raise refuse(f"needs {size} bytes of data and has {len(data)} or more")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if header[2] == b"True" else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
