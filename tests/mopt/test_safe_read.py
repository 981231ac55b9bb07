"""Names from inside files open nothing but plain files beneath their own folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopt.errors import ArtifactError, InputError, LimitError, UsageError
from mopt.limits import DEFAULT_LIMITS, parse_limits
from mopt.safe_read import Folder, check_name, check_names, open_file, sha256_of

UNSAFE = [
    "", "/", "/etc/passwd", "..", "../x", "a/../b", "a//b", "a/", "./a", ".hidden", "a/.git/x",
    "a\\b", "a:b", "a b", "a\x00b", "é", "a\n", "con", "NUL.txt", "a/com1", "a.", "-rf",
    "x" * 122, "/".join("abcdefghi"), None, 3, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE, ids=repr)
def test_unsafe_names_are_refused(name: object) -> None:
    with pytest.raises(ArtifactError) as caught:
        check_name(name, where="manifest.json")
    assert caught.value.code == "unsafe-path"
    assert "manifest.json" in caught.value.message
    assert len(caught.value.message) < 220


def test_plain_names_are_split() -> None:
    assert check_name("a/b-1/model.onnx", where="m") == ("a", "b-1", "model.onnx")
    assert check_name("/".join("abcdefgh"), where="m") == tuple("abcdefgh")
    assert check_name("x" * 121, where="m") == ("x" * 121,)


@given(st.text(max_size=30))
def test_an_accepted_name_stays_beneath(name: str) -> None:
    try:
        segments = check_name(name, where="m")
    except ArtifactError:
        return
    assert not os.path.isabs(name) and ".." not in segments  # noqa: PTH117
    assert Path("/base", name).resolve().is_relative_to("/base")


def test_names_equal_but_for_case_are_refused() -> None:
    check_names(["a/b", "a/c", "B"], where="m")
    with pytest.raises(ArtifactError, match=r"'a/b' and 'A/b'"):
        check_names(["a/b", "c", "A/b"], where="m")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "artifact"
    (base / "sub").mkdir(parents=True)
    (base / "sub/plain.bin").write_bytes(b"plain")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.bin").write_bytes(b"secret")
    (base / "link.bin").symlink_to(secret / "key.bin")
    (base / "inside.bin").symlink_to("sub/plain.bin")
    (base / "linked").symlink_to(secret)
    (base / "hard.bin").hardlink_to(secret / "key.bin")
    os.mkfifo(base / "fifo.bin")
    return base


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("link.bin", "unsafe-file"),
        ("inside.bin", "unsafe-file"),
        ("linked/key.bin", "unsafe-file"),
        ("hard.bin", "unsafe-file"),
        ("fifo.bin", "not-a-file"),
        ("sub", "not-a-file"),
        ("sub/plain.bin/x", "unsafe-file"),
        ("absent.bin", "file-not-found"),
        ("../secret/key.bin", "unsafe-path"),
    ],
)
def test_everything_but_a_plain_file_is_refused(folder: Path, name: str, code: str) -> None:
    with Folder(folder) as opened, pytest.raises(ArtifactError) as caught:
        opened.open_file(name)
    assert caught.value.code == code


def test_what_was_checked_is_what_is_read(folder: Path) -> None:
    """Neither renaming the folder nor planting a link redirects an opened file."""
    with Folder(folder) as opened, opened.open_file("sub/plain.bin") as file:
        folder.rename(folder.with_name("moved"))
        folder.mkdir()
        (folder / "sub").symlink_to("/etc")
        assert file.read() == b"plain"
        assert Path(file.handle_path).read_bytes() == b"plain"
        assert file.sha256() == hashlib.sha256(b"plain").hexdigest()
        assert file.read_at(1, 3) == b"lai"
        assert bytes(file.map()) == b"plain"
        with pytest.raises(ArtifactError, match="ends at byte 5"):
            file.read_at(3, 5)
        with opened.open_file("sub/plain.bin") as again:
            assert again.read() == b"plain"


def test_no_handles_are_left_open(folder: Path) -> None:
    def handles() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = handles()
    for name in ("sub/plain.bin", "link.bin", "hard.bin", "fifo.bin", "linked/key.bin", "no"):
        with Folder(folder) as opened:
            try:
                opened.open_file(name).close()
            except ArtifactError:
                continue
    assert handles() == before


def test_a_file_that_grows_or_shrinks_is_noticed(folder: Path) -> None:
    path = folder / "sub/plain.bin"
    for data in (b"longer than before", b"s"):
        path.write_bytes(b"plain")
        with open_file(path) as file:
            path.write_bytes(data)
            for use in (file.read, file.sha256):
                with pytest.raises(InputError) as caught:
                    use()
                assert caught.value.code == "file-changed"


def test_files_the_user_named(folder: Path) -> None:
    """He may name links; what he gets wrong is his input, not a broken artifact."""
    assert sha256_of(folder / "link.bin") == hashlib.sha256(b"secret").hexdigest()
    cases: list[tuple[object, str]] = [
        (folder / "absent", "file-not-found"),
        (folder / "sub", "not-a-file"),
        (folder / "fifo.bin", "not-a-file"),
        ("a\0b", "file-unreadable"),
    ]
    for path, code in cases:
        with pytest.raises(InputError) as caught:
            open_file(path)  # type: ignore[arg-type]
        assert caught.value.code == code
    with pytest.raises(LimitError) as limited:
        open_file(folder / "sub/plain.bin", max_bytes=4)
    assert limited.value.code == "file-too-large"


def test_folders_the_user_named(folder: Path) -> None:
    for path, code in [(folder / "no", "folder-not-found"), (__file__, "not-a-folder")]:
        with pytest.raises(InputError) as caught:
            Folder(path)
        assert caught.value.code == code
    with Folder(folder) as opened:
        assert opened.has("link.bin") and opened.has("sub") and not opened.has("no")


def test_limits_are_settings() -> None:
    limits = parse_limits(["json-depth=64", "input_bytes = 2GiB"])
    assert (limits.json_depth, limits.input_bytes) == (64, 2 << 30)
    assert limits.toml_depth == DEFAULT_LIMITS.toml_depth
    wrong = {
        "json-depth": "limit-syntax",
        "json-depth=-1": "limit-syntax",
        "json-depth=1 acre": "limit-syntax",
        "json-dept=3": "unknown-limit",
    }
    for setting, code in wrong.items():
        with pytest.raises(UsageError) as caught:
            parse_limits([setting])
        assert caught.value.code == code
    assert "json-depth" in str(caught.value), "the nearest name is suggested"
