"""npz and npy from strangers: no pickles, no bombs, no lies about sizes."""

from __future__ import annotations

import io
import os
import pickle
import random
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mopt.disk import Files, using
from mopt.errors import ArtifactError, InputError, LimitError, MoptError
from mopt.limits import parse_limits
from mopt.npz_files import read_npy, read_npz, write_npz
from mopt.safe_read import Folder

ARRAYS = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "input.1": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">f8"),
    "flag": np.array([True, False]),
    "scalar": np.array(3, np.int8),
    "half": np.ones((1, 1, 1), np.float16),
    "empty": np.zeros((0, 3), np.float32),
}


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + data


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def same(found: dict[str, np.ndarray]) -> None:
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype.newbyteorder("=")
        assert found[name].flags.writeable


def test_numpys_files_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **ARRAYS)
    np.savez_compressed(tmp_path / "b.npz", **ARRAYS)
    same(read_npz(tmp_path / "a.npz"))
    same(read_npz(tmp_path / "b.npz"))
    np.save(tmp_path / "x.npy", ARRAYS["x"])
    np.testing.assert_array_equal(read_npy(tmp_path / "x.npy"), ARRAYS["x"])


def test_ours_are_read_by_numpy_and_are_stable(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", ARRAYS)
    os.utime(tmp_path / "a.npz", (0, 0))
    write_npz(tmp_path / "b.npz", ARRAYS)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(loaded[name], array)
    same(read_npz(tmp_path / "a.npz"))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    class Full(Files):
        count = 0

        def before(self, operation: str, path: str) -> None:
            self.count += 1
            if self.count == 12:
                raise OSError(28, "No space left on device")

    with pytest.raises(LimitError), using(Full()):
        write_npz(tmp_path / "a.npz", ARRAYS)
    assert list(tmp_path.iterdir()) == []


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("/tmp/never-made",))


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    ("member", "code"),
    [
        (npy(np.array([Evil()], dtype=object)), "npy-header"),
        (pickle.dumps(Evil()), "npy-header"),
        (b"", "npy-header"),
        (b"\x93NUMPY\x01\x00", "npy-header"),
        (b"\x93NUMPY\x09\x00" + header(GOOD)[8:], "npy-header"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"x", "npy-header"),
        (header(GOOD, b"1234"), "npy-header"),
        (header(GOOD, b"123456789"), "npy-header"),
        (header(GOOD.replace("(2,)", "(-2,)"), b"12345678"), "npy-header"),
        (header(GOOD.replace("(2,)", f"({10**19 - 1}, {10**19 - 1})")), "npz-too-large"),
        (header(GOOD.replace("(2,)", "(1073741824, 2)")), "npz-too-large"),
        (header(GOOD.replace("(2,)", "(1000000,)")), "npy-header"),
        (header(GOOD.replace("(2,)", "(" + "1, " * 33 + ")"), b"1234"), "npy-header"),
        (header(GOOD.replace("<f4", "|V8"), b"1" * 16), "npy-header"),
        (header(GOOD.replace("<f4", "<c8"), b"1" * 16), "npy-header"),
        (header(GOOD.replace("(2,)", "__import__('os').mkdir('/tmp/never-made')")), "npy-header"),
        (header("(" * 5000), "npy-header"),
    ],
    ids=lambda v: repr(v[:40]) if isinstance(v, bytes) else None,
)
def test_hostile_arrays_are_refused(tmp_path: Path, member: bytes, code: str) -> None:
    path = zipped(tmp_path / "a.npz", {"x.npy": member})
    with pytest.raises(MoptError) as caught:
        read_npz(path)
    assert caught.value.code == code
    assert not Path("/tmp/never-made").exists()
    (tmp_path / "x.npy").write_bytes(member)
    with pytest.raises(MoptError):
        read_npy(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"../x.npy": npy(np.ones(1))}, "unsafe-path"),
        ({"/x.npy": npy(np.ones(1))}, "unsafe-path"),
        ({"x.npy": npy(np.ones(1)), "X.npy": npy(np.ones(1))}, "unsafe-path"),
        ({"x.pkl": pickle.dumps(1)}, "npz-member"),
        ({f"a{i}.npy": b"" for i in range(1025)}, "npz-too-large"),
    ],
    ids=["traversal", "absolute", "case", "pickle", "1025 members"],
)
def test_hostile_archives_are_refused(tmp_path: Path, members: dict[str, bytes], code: str) -> None:
    with pytest.raises(MoptError) as caught:
        read_npz(zipped(tmp_path / "a.npz", members))
    assert caught.value.code == code


def test_other_compression_and_broken_archives(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", {"x.npy": npy(np.ones(100))}, zipfile.ZIP_LZMA)
    with pytest.raises(InputError) as caught:
        read_npz(path)
    assert caught.value.code == "npz-member"
    good = zipped(tmp_path / "b.npz", {"x.npy": npy(np.ones(100))}).read_bytes()
    for data in (b"", b"PK", b"x" * 100, good[:-1], good + b"tail", good[:50] + b"!" + good[51:]):
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            read_npz(path)
        assert caught.value.code in ("npz-format", "npy-header")


def test_a_bomb_is_refused_before_it_goes_off(tmp_path: Path) -> None:
    zeros = header(GOOD.replace("(2,)", f"({1 << 26},)"))
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as stream,
    ):
        stream.write(zeros)
        for _ in range(256):
            stream.write(bytes(1 << 20))
    assert path.stat().st_size < 300_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LimitError, match="would grow"):
        read_npz(path)
    with pytest.raises(LimitError, match="at most 1000 are read"):
        read_npz(path, limits=parse_limits(["input-bytes=1000"]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_a_false_size_in_the_archive_costs_nothing(tmp_path: Path) -> None:
    """The list of members claims 40 bytes where 256 MiB of zeros follow."""
    path = tmp_path / "liar.npz"
    data = header(GOOD.replace("(2,)", f"({1 << 24},)")) + bytes(1 << 26)
    zipped(path, {"x.npy": data}, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 24 : at + 28] = struct.pack("<I", 40)
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read_npz(path)
    assert caught.value.code in ("npz-format", "npy-header")


def test_a_false_count_of_members_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", {"x.npy": npy(np.ones(1))})
    raw = bytearray(path.read_bytes())
    raw[-10:-6] = struct.pack("<I", 1 << 30)
    path.write_bytes(raw)
    with pytest.raises(LimitError):
        read_npz(path)


def test_mutated_files_never_escape_as_other_errors(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=ARRAYS["x"], y=ARRAYS["big_endian"])
    good = (tmp_path / "a.npz").read_bytes()
    rng = random.Random(0)
    path = tmp_path / "b.npz"
    for _ in range(600):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        path.write_bytes(data)
        try:
            read_npz(path)
        except MoptError:
            continue


def test_errors_take_the_class_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"x" * 100)
    with (
        Folder(tmp_path) as folder,
        folder.open_file("a.npz") as file,
        pytest.raises(ArtifactError),
    ):
        read_npz(file)
