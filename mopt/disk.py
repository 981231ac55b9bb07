"""The operations that change the disk, in one object that tests can make fail.

Everything mopt writes passes through ``current_files()``; a test makes the n-th operation fail, or
kills the process there, with ``with using(FaultyFiles()): ...``. Writers of whole files and
folders are in ``mopt/files.py``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from mopt.errors import InputError, LimitError, MoptError, quote

# What the system says when something has no room: the disk, a quota, the limit on a file.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_STALE_SECONDS = 3600.0


class Files:
    """The operations that change the disk; ``before`` is called ahead of each one.

    Subclass it in tests and override ``before`` to raise or to kill.
    """

    def before(self, operation: str, path: str) -> None:
        """Hook for tests; operations: create, write, sync, close, mkdir, rename, exchange."""

    def create(self, path: str) -> int:
        """Open a new file for writing; it must not exist."""
        self.before("create", path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o666)

    def write(self, fd: int, data: bytes | memoryview, path: str) -> None:
        """Write all of ``data`` at the current position."""
        view = memoryview(data).cast("B")
        while view:
            self.before("write", path)
            view = view[os.write(fd, view[: 1 << 24]) :]

    def sync(self, fd: int, path: str) -> None:
        """Make what was written durable; a failure here means that it was not."""
        self.before("sync", path)
        os.fsync(fd)

    def close(self, fd: int, path: str) -> None:
        """Close a written file; file systems may report a failed write only here."""
        try:
            self.before("close", path)
        finally:
            os.close(fd)

    def sync_path(self, path: str) -> None:
        """``sync`` a file or folder by its name: for files that a library wrote, and for names."""
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self.sync(fd, path)
        finally:
            os.close(fd)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        """Make a folder that must not exist."""
        self.before("mkdir", path)
        Path(path).mkdir(mode)

    def rename(self, old: str, new: str) -> None:
        """Rename; a file at ``new`` is replaced, a filled folder there is an error."""
        self.before("rename", new)
        Path(old).replace(new)

    def exchange(self, one: str, other: str) -> bool:
        """Swap two names in one step; False where the file system cannot."""
        self.before("exchange", other)
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is None:
            return False
        failed = renameat2(
            _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
        )
        if not failed:
            return True
        code = ctypes.get_errno()
        if code in _NO_EXCHANGE:
            return False
        raise OSError(code, os.strerror(code), other)


_DISK = Files()
_current: ContextVar[Files | None] = ContextVar("mopt_files", default=None)


def current_files() -> Files:
    """The object all writes go through now."""
    return _current.get() or _DISK


@contextmanager
def using(files: Files) -> Iterator[Files]:
    """Send all writes of this context through ``files``: how tests inject faults."""
    token = _current.set(files)
    try:
        yield files
    finally:
        _current.reset(token)


class FileWriter:
    """A new file being written: ``write``, ``tell`` and ``flush``, enough for zip writers.

    ``close`` syncs first; leaving a ``with`` block by an exception closes without a promise.
    ``shown`` is the name in messages. Raises the errors of ``write_error``.
    """

    def __init__(self, path: str, shown: str) -> None:
        self.path = path
        self.shown = shown
        self.bytes_written = 0
        self._files = current_files()
        self._fd = -1
        with self._errors_shown():
            self._fd = self._files.create(path)
        lock(self._fd)

    @contextmanager
    def _errors_shown(self, more: int = 0) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise write_error(e, self.shown, self.bytes_written + more) from e

    @property
    def is_open(self) -> bool:
        """Whether neither ``close`` nor ``abandon`` was called."""
        return self._fd >= 0

    @property
    def mode(self) -> int:
        """Permission bits, from the umask unless ``set_mode`` was called."""
        return stat.S_IMODE(os.fstat(self._fd).st_mode)

    def set_mode(self, mode: int) -> None:
        """Set the permission bits."""
        with self._errors_shown():
            os.fchmod(self._fd, mode)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append ``data``; gives its length in bytes."""
        view = memoryview(data).cast("B")
        with self._errors_shown(len(view)):
            self._files.write(self._fd, view, self.path)
        self.bytes_written += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes_written

    def flush(self) -> None:
        """Nothing is buffered; here for writers that call it."""

    def close(self) -> None:
        """Sync and close; an error in either means the file was not written."""
        if self._fd < 0:
            return
        with self._errors_shown():
            try:
                self._files.sync(self._fd, self.path)
            except BaseException:
                self.abandon()
                raise
            fd, self._fd = self._fd, -1
            self._files.close(fd, self.path)

    def abandon(self) -> None:
        """Close without any promise about what was written."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def write_error(e: OSError, shown: str, needed: int | None = None) -> MoptError:
    """The error to show for an ``OSError`` met while writing ``shown``."""
    if e.errno in FULL:
        need = f", at least {needed} bytes are needed" if needed else ""
        return LimitError(
            f"no space left to write {quote(shown)}: {free_bytes(shown)} bytes are free{need}",
            code="disk-full",
            hint="free some space or choose another folder; what was there before is unchanged",
        )
    if e.errno in _REFUSED:
        return InputError(
            f"{quote(shown)} cannot be written: {e.strerror}",
            code="output-read-only",
            hint="choose a folder you may write to",
        )
    return InputError(f"{quote(shown)} cannot be written: {e.strerror or e}", code="write-failed")


def free_bytes(target: str | os.PathLike[str]) -> int:
    """Bytes a normal user may still write to the file system that holds ``target``."""
    status = os.statvfs(existing_parent(target))
    return status.f_bavail * status.f_frsize


def existing_parent(target: str | os.PathLike[str]) -> str:
    """The nearest folder above ``target`` that exists."""
    folder = Path(target).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    return str(folder)


def check_space(target: str | os.PathLike[str], needed: int) -> None:
    """Raise LimitError ``disk-full`` now if ``needed`` bytes will not fit beside ``target``."""
    if free_bytes(target) < needed:
        raise write_error(OSError(errno.ENOSPC, "no space"), os.fspath(target), needed)


def check_writable(target: str | os.PathLike[str]) -> None:
    """Raise InputError ``output-read-only`` if nothing can be made beside ``target``."""
    folder = existing_parent(target)
    if os.statvfs(folder).f_flag & os.ST_RDONLY or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"the folder {quote(folder)} is read-only",
            code="output-read-only",
            hint="choose a folder you may write to",
        )


def lock(fd: int) -> bool:
    """Take the lock that marks a temporary as in use; it ends with the process.

    False if another process holds it; True too where the file system knows no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def temporary_name(name: str, kind: str = "part") -> str:
    """A fresh ``.NAME.part-PID-RANDOM``, the shape that ``stale_temporaries`` looks for."""
    return f".{name[:150]}.{kind}-{os.getpid()}-{os.urandom(4).hex()}"


def stale_temporaries(folder: str, name: str, kind: str = "part") -> list[str]:
    """Paths of the temporaries of ``name`` in ``folder`` whose process is gone, sorted.

    Gone: no process has the number and none holds the lock (the number alone is not enough where
    containers share a folder); or the number was given to somebody else an hour ago.
    """
    prefix = f".{name[:150]}.{kind}-"
    found = []
    for entry in sorted(os.listdir(folder)):  # noqa: PTH208
        pid, _, random = entry.removeprefix(prefix).partition("-")
        if entry.startswith(prefix) and pid.isdigit() and random:
            path = f"{folder}/{entry}"
            if _is_stale(path, int(pid)):
                found.append(path)
    return found


def _is_stale(path: str, pid: int) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not lock(fd):
            return False
        if not Path(f"/proc/{pid}").exists():
            return True
        return pid != os.getpid() and time.time() - os.fstat(fd).st_mtime > _STALE_SECONDS
    finally:
        os.close(fd)


def scratch_folder(name: str) -> tuple[Path, Callable[[], None]]:
    """A new private folder among the temporary files, and how to remove it.

    Those that killed processes of the same user left behind are removed first.
    """
    place = tempfile.gettempdir()
    for old in stale_temporaries(place, name):
        with suppress(OSError):  # somebody else may remove it at the same time
            if os.lstat(old).st_uid == os.getuid():
                remove_any(old)
    path = f"{place}/{temporary_name(name)}"
    Path(path).mkdir(mode=0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    lock(fd)

    def remove() -> None:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)

    return Path(path), remove


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder as :func:`scratch_folder` makes it, removed at the end of the block."""
    folder, remove = scratch_folder(name)
    try:
        yield folder
    finally:
        remove()


def remove_any(path: str) -> None:
    """Remove a file, link or folder if it is there; what cannot be removed is left behind."""
    try:
        Path(path).unlink()
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return
