"""Files and folders are complete or absent, whatever fails and whenever it fails."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from mopt.disk import Files, FileWriter, stale_temporaries, temporary_name, using
from mopt.errors import InputError, InternalError, LimitError, MoptError, UsageError
from mopt.files import atomic_file, check_target, write_file_atomic, write_folder
from mopt.safe_read import sha256_of

OLD = {"manifest.json": b"old", "data.bin": b"x" * 100}
NEW = {"sub/weights.bin": b"w" * 1000, "report.json": b'{\n  "a": 1\n}\n', "manifest.json": b"new"}


class FaultAt(Files):
    """Calls ``fault`` ahead of the n-th operation and counts them."""

    def __init__(self, n: int, fault: Callable[[], None], can_exchange: bool = True) -> None:
        self.n, self.fault, self.can_exchange = n, fault, can_exchange
        self.count = 0

    def before(self, operation: str, path: str) -> None:
        self.count += 1
        if self.count == self.n:
            self.fault()

    def exchange(self, one: str, other: str) -> bool:
        if self.can_exchange:
            return super().exchange(one, other)
        self.before("exchange", other)
        return False


def raises(error: BaseException) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, by relative name; temporaries show up under their own name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_new(target: Path, force: bool) -> None:
    with write_folder(target, force=force) as out:
        out.write("sub/weights.bin", NEW["sub/weights.bin"])
        out.write_json("report.json", {"a": 1})
        out.write("manifest.json", NEW["manifest.json"])


def under(name: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}/{key}": data for key, data in files.items()}


SITUATIONS = pytest.mark.parametrize(
    ("before", "can_exchange"),
    [({}, True), (OLD, True), (OLD, False)],
    ids=["new", "exchanged", "moved aside"],
)


@SITUATIONS
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")],
    ids=["full", "io"],
)
def test_every_failing_operation_leaves_what_was_there(
    tmp_path: Path, before: dict[str, bytes], can_exchange: bool, error: OSError
) -> None:
    """Fail the n-th operation for n = 1, 2, ... until it succeeds (SQLite's method)."""
    target = tmp_path / "out"
    put(target, before)
    start = tree(tmp_path)
    for n in range(1, 100):
        files = FaultAt(n, raises(error), can_exchange)
        try:
            with using(files):
                write_new(target, force=bool(before))
        except MoptError as e:
            assert e.code == ("disk-full" if error.errno == errno.ENOSPC else "write-failed")
            assert tree(tmp_path) == start, f"operation {n}"
        else:
            assert files.count < n
            break
    assert n > 15, "the sweep must have met every create, write, sync, close and rename"
    assert tree(tmp_path) == under("out", NEW)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@SITUATIONS
def test_interrupt_at_every_operation_leaves_old_or_new(
    tmp_path: Path, before: dict[str, bytes], can_exchange: bool
) -> None:
    target = tmp_path / "out"
    put(target, before)
    start = tree(tmp_path)
    for n in range(1, 100):
        files = FaultAt(n, raises(KeyboardInterrupt()), can_exchange)
        try:
            with using(files):
                write_new(target, force=bool(before))
        except KeyboardInterrupt:
            assert tree(tmp_path) == start, f"operation {n}"
        else:
            break
    assert tree(tmp_path) == under("out", NEW)


@SITUATIONS
def test_kill_at_every_operation_then_the_same_call_succeeds(
    tmp_path: Path, before: dict[str, bytes], can_exchange: bool
) -> None:
    kills = 0
    for n in range(1, 100):
        folder = tmp_path / str(n)
        target = folder / "out"
        folder.mkdir()
        put(target, before)
        child = os.fork()
        if not child:
            with using(FaultAt(n, lambda: os.kill(os.getpid(), signal.SIGKILL), can_exchange)):
                write_new(target, force=bool(before))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        left = {k: v for k, v in tree(folder).items() if not k.startswith(".")}
        complete = [under("out", NEW), under("out", before)]
        # Where names cannot be exchanged, a kill between the two renames leaves only `.old`.
        assert left in complete or (not can_exchange and left == {}), f"operation {n}"
        if not os.WIFSIGNALED(status):
            break
        kills += 1
        write_new(target, force=bool(left or before))
        assert tree(folder) == under("out", NEW), f"operation {n}"
        assert [p.name for p in folder.iterdir()] == ["out"], "the next run removes what was left"
    assert kills > 15


def test_old_folder_moved_aside_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        aside = tmp_path / temporary_name("out", kind="old")
        put(aside, OLD)
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(UsageError, match="exists"):
        check_target(tmp_path / "out")
    assert tree(tmp_path) == under("out", OLD)


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught, write_folder(tmp_path / "out") as first:
        first.write("a.bin", b"1")
        with write_folder(tmp_path / "out") as second:
            second.write("manifest.json", b"second")
        assert first.path.is_dir(), "the temporary of a living process is left alone"
    assert caught.value.code == "output-exists"
    assert tree(tmp_path) == {"out/manifest.json": b"second"}


def test_temporary_locked_by_another_container_is_left_alone(tmp_path: Path) -> None:
    """Its process number means nothing here, but the lock does."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with FileWriter(str(tmp_path / ".out.part-999999999-aa"), "out"):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    assert stale_temporaries(str(tmp_path), "out") == []
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    assert len(stale_temporaries(str(tmp_path), "out")) == 1


def test_exception_in_the_block_leaves_nothing_and_passes_through(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        write_folder(tmp_path / "deep/er/out") as out,
    ):
        out.write("a.bin", b"1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_library_files_and_modes(tmp_path: Path) -> None:
    """What a library wrote by path is synced too; a private temporary gives a public folder."""
    synced: list[str] = []

    class Watch(Files):
        def before(self, operation: str, path: str) -> None:
            if operation == "sync":
                synced.append(Path(path).name)

    with using(Watch()), write_folder(tmp_path / "out") as out:
        (out.path / "by-library.bin").write_bytes(b"1")
        assert stat.S_IMODE(out.path.stat().st_mode) == 0o700
        out.copy(__file__, "copy.py")
        out.write("manifest.json", b"{}")
    assert synced.count("by-library.bin") == 1
    assert synced[-1] == tmp_path.name, "the parent last, after the rename"
    assert (tmp_path / "out/copy.py").read_bytes() == Path(__file__).read_bytes()
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode


def test_a_copy_is_read_again(tmp_path: Path) -> None:
    put(tmp_path, {"a.bin": b"abc"})
    with write_folder(tmp_path / "out") as out:
        out.copy(tmp_path / "a.bin", "a.bin", sha256=sha256_of(tmp_path / "a.bin"))
    with pytest.raises(InputError) as caught, write_folder(tmp_path / "two") as out:
        out.copy(tmp_path / "a.bin", "a.bin", sha256="0" * 64)
    assert caught.value.code == "write-failed"
    assert not (tmp_path / "two").exists()


def test_file_left_open_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="left open"), write_folder(tmp_path / "out") as out:
        out.create("a.bin").write(b"1")
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    put(tmp_path / "out", OLD)
    with pytest.raises(UsageError) as caught, write_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert caught.value.code == "output-exists"
    assert "--force" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "name", "code"),
    [
        (lambda p: (p / "out").write_text("mine"), "out", "output-exists"),
        (lambda p: put(p / "out", {"thesis.tex": b"mine"}), "out", "output-exists"),
        (lambda p: (p / "out").symlink_to("real"), "out", "output-is-link"),
        (lambda p: (p / "out").write_text("mine"), "out/deeper", "output-exists"),
    ],
    ids=["a file", "a folder of something else", "a link", "below a file"],
)
def test_force_replaces_only_artifacts(
    tmp_path: Path, make: Callable[[Path], object], name: str, code: str
) -> None:
    put(tmp_path / "real", OLD)
    make(tmp_path)
    start = tree(tmp_path)
    with pytest.raises(UsageError) as caught:
        check_target(tmp_path / name, force=True)
    assert caught.value.code == code
    assert tree(tmp_path) == start


def test_force_refuses_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "out", OLD)
    (tmp_path / "out/sub").mkdir()
    monkeypatch.chdir(tmp_path / "out/sub")
    for name in (tmp_path / "out", "..", "."):
        with pytest.raises(UsageError):
            check_target(name, force=True)


def test_force_takes_an_empty_folder_and_a_folder_below_a_link(tmp_path: Path) -> None:
    (tmp_path / "real/out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    write_new(tmp_path / "link/out", force=True)
    assert tree(tmp_path / "real") == under("out", NEW)


def test_space_is_looked_for_first_and_the_message_has_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(LimitError) as caught, write_folder(tmp_path / "out", needed=1 << 60):
        pytest.fail("the block must not run")
    assert caught.value.code == "disk-full"
    assert str(1 << 60) in str(caught.value) and "bytes are free" in str(caught.value)
    with pytest.raises(LimitError), write_folder(tmp_path / "out") as out:
        out.reserve(1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(MoptError) as caught:
        check_target(tmp_path / "out")
    assert caught.value.code == "output-read-only"
    monkeypatch.undo()
    files = FaultAt(1, raises(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(MoptError) as caught, using(files):
        write_new(tmp_path / "out", force=False)
    assert caught.value.code == "output-read-only"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_met_by_a_library(tmp_path: Path, number: int) -> None:
    """EFBIG is what a limit on the size of files gives, or a file system that has one."""
    with pytest.raises(LimitError) as caught, write_folder(tmp_path / "out") as out:
        out.write("a.bin", b"x" * 500)
        raise OSError(number, os.strerror(number))
    assert caught.value.code == "disk-full" and "500" in str(caught.value)


def test_names_that_our_own_reader_refuses_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(MoptError) as caught, write_folder(tmp_path / "out") as out:
        out.write("../escape", b"")
    assert caught.value.code == "unsafe-path"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [None, b"old"])
def test_one_file_is_all_or_nothing_at_every_operation(
    tmp_path: Path, before: bytes | None
) -> None:
    path = tmp_path / "baseline.json"
    if before is not None:
        path.write_bytes(before)
        path.chmod(0o640)
    start = tree(tmp_path)
    for n in range(1, 20):
        try:
            with using(FaultAt(n, raises(OSError(errno.ENOSPC, "full")))):
                write_file_atomic(path, b"new" * 100)
        except LimitError:
            # The last operation makes the rename durable; the new file is whole by then.
            assert n == 6 or tree(tmp_path) == start, f"operation {n}"
            assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        else:
            break
    assert n == 7, "create, write, sync, close, rename, sync of the folder"
    assert tree(tmp_path) == {"baseline.json": b"new" * 100}
    if before is not None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_one_file_through_a_link_and_never_over_a_device(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_bytes(b"old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_file_atomic(tmp_path / "link.json", b"new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_bytes() == b"new"
    with pytest.raises(UsageError) as caught:
        write_file_atomic("/dev/null", b"x")
    assert caught.value.code == "output-not-file"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)  # noqa: PTH116
    with pytest.raises(UsageError, match="no folder"), atomic_file(tmp_path / "no/where.json"):
        pytest.fail("the block must not run")
