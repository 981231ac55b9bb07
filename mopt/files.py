"""Writing: a file or folder is complete or absent, and an old one stays until the new is durable.

Writers fill a temporary beside the target, sync every file and the folder, then rename: a rename
without the syncs survives a crash of the process, not of the machine (Pillai et al., OSDI 2014).
An existing folder is replaced by exchanging the two names in one step.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mopt.disk import (
    FULL,
    Files,
    FileWriter,
    check_space,
    check_writable,
    current_files,
    lock,
    remove_any,
    stale_temporaries,
    temporary_name,
    write_error,
)
from mopt.errors import InputError, InternalError, UsageError, quote
from mopt.json_files import json_bytes
from mopt.safe_read import check_name, open_file, sha256_of

MANIFEST = "manifest.json"
_CHUNK = 1 << 24


def check_target(target: str | os.PathLike[str], force: bool = False) -> Path:
    """The absolute path of an output folder, or the reason it cannot be written, before any work.

    Raises UsageError ``output-exists`` (also with ``force`` when the folder is not one mopt
    wrote), ``output-is-link``, ``output-in-use``, or InputError ``output-read-only``. A folder
    that an interrupted exchange had moved aside is put back first.
    """
    given = os.fspath(target)
    if Path(given).name in ("", ".."):
        path = Path(given).resolve()
    else:
        path = Path(given).parent.resolve() / Path(given).name
    if path.parent.is_dir():
        _put_back(path)
    check_writable(path)
    if not os.path.lexists(path):
        _check_parents(path, given)
        return path
    if not force:
        raise UsageError(
            f"the output {quote(given)} exists",
            code="output-exists",
            hint="pass --force to replace it",
        )
    if path.is_symlink():
        raise UsageError(
            f"the output {quote(given)} is a link to {quote(str(path.readlink()))}",
            code="output-is-link",
            hint="name the folder itself",
        )
    if path == Path.cwd() or path in Path.cwd().parents:
        raise UsageError(
            f"the output {quote(given)} holds the current folder",
            code="output-in-use",
            hint="run from another folder",
        )
    if not path.is_dir() or (any(path.iterdir()) and not (path / MANIFEST).is_file()):
        raise UsageError(
            f"the output {quote(given)} exists and is not a folder that mopt wrote",
            code="output-exists",
            hint="choose another name; --force replaces only artifacts",
        )
    return path


def _check_parents(path: Path, given: str) -> None:
    for parent in path.parents:
        if parent.is_dir():
            return
        if os.path.lexists(parent):
            raise UsageError(
                f"the output {quote(given)} lies below {quote(str(parent))}, which is no folder",
                code="output-exists",
            )


def _put_back(path: Path) -> None:
    for old in stale_temporaries(str(path.parent), path.name, kind="old"):
        if os.path.lexists(path):
            remove_any(old)
        else:
            current_files().rename(old, str(path))


class FolderWriter:
    """The folder being written. ``path`` is the temporary one, for libraries that need a path."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.target = target
        self._written: set[str] = set()
        self._open: list[FileWriter] = []
        self._mode: int | None = None

    def create(self, name: str) -> FileWriter:
        """A writer of a new file ``name`` (``/`` for folders below); use it in a ``with``."""
        segments = check_name(name, where="the output")
        below = str(self.path)
        for segment in segments[:-1]:
            below = f"{below}/{segment}"
            if not Path(below).is_dir():
                try:
                    current_files().mkdir(below)
                except OSError as e:
                    raise write_error(e, str(self.target)) from e
        writer = FileWriter(f"{below}/{segments[-1]}", str(self.target / name))
        self._mode = writer.mode
        self._written.add(writer.path)
        self._open.append(writer)
        return writer

    def write(self, name: str, data: bytes) -> None:
        """Write one whole file."""
        with self.create(name) as writer:
            writer.write(data)

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` in the one form of ``mopt.json_files.json_bytes``."""
        self.write(name, json_bytes(value))

    def copy(self, source: str | os.PathLike[str], name: str, *, sha256: str | None = None) -> None:
        """Copy a regular file, byte for byte, to ``name``.

        With ``sha256`` the copy is read again and must have that hash, else InputError
        ``write-failed``: for large files, which a full or failing disk damages first.
        """
        with open_file(source) as file, self.create(name) as writer:
            for offset in range(0, file.size, _CHUNK):
                writer.write(file.read_at(offset, min(_CHUNK, file.size - offset)))
        if sha256 is not None and sha256_of(writer.path) != sha256:
            raise InputError(
                f"{quote(name)} was written but does not read back as it was",
                code="write-failed",
                hint="check the disk, or choose another folder",
            )

    def reserve(self, needed: int) -> None:
        """Raise LimitError ``disk-full`` now if ``needed`` more bytes will not fit."""
        check_space(self.target, needed)

    def _finish(self, files: Files) -> None:
        """Sync what libraries wrote by path, then the folders from the inside out."""
        left = [writer.path for writer in self._open if writer.is_open]
        if left:
            raise InternalError(f"left open while writing: {left}", code="file-left-open")
        for folder, _, names in os.walk(self.path, topdown=False):
            for name in sorted(names):
                path = f"{folder}/{name}"
                if path not in self._written:
                    files.sync_path(path)
            files.sync_path(folder)
        if self._mode is not None:
            # The temporary was private; the result gets what the umask gave its files.
            self.path.chmod(self._mode | (self._mode & 0o444) >> 2 | 0o700)

    def _abandon(self) -> None:
        for writer in self._open:
            writer.abandon()


@contextmanager
def write_folder(
    target: str | os.PathLike[str], *, force: bool = False, needed: int = 0
) -> Iterator[FolderWriter]:
    """A folder that appears under ``target`` when the block ends, all at once and durable.

    Write the manifest last. On any error or interrupt ``target`` is as it was before and no
    temporary is left (one left by a killed process is removed by the next call). ``needed`` bytes
    are looked for first. Raises what ``check_target`` raises, LimitError ``disk-full``, InputError
    ``output-read-only`` or ``write-failed``.
    """
    path = check_target(target, force)
    shown = os.fspath(target)
    check_space(path, needed)
    files = current_files()
    with ExitStack() as undo:
        try:
            _make_parents(path.parent, files, undo)
            for stale in stale_temporaries(str(path.parent), path.name):
                remove_any(stale)
            temporary = str(path.parent / temporary_name(path.name))
            undo.callback(remove_any, temporary)
            files.mkdir(temporary, 0o700)
            fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, fd)
            lock(fd)
        except OSError as e:
            raise write_error(e, shown) from e
        writer = FolderWriter(Path(temporary), path)
        undo.callback(writer._abandon)
        try:
            yield writer
        except OSError as e:
            # A library that wrote by path met the full disk; other errors are not about writing.
            if e.errno in FULL:
                raise write_error(e, shown, _tree_bytes(temporary)) from e
            raise
        try:
            writer._finish(files)
            _commit(temporary, str(path), files, force)
        except OSError as e:
            if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UsageError(
                    f"the output {quote(shown)} was made by somebody else in the meantime",
                    code="output-exists",
                    hint="pass --force to replace it",
                ) from e
            raise write_error(e, shown, _tree_bytes(temporary)) from e
        # What is undone now: the old folder, which the exchange left under the temporary's name.


def _make_parents(folder: Path, files: Files, undo: ExitStack) -> None:
    if folder.is_dir():
        return
    _make_parents(folder.parent, files, undo)
    files.mkdir(str(folder))
    undo.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _tree_bytes(folder: str) -> int:
    return sum(Path(f, n).lstat().st_size for f, _, names in os.walk(folder) for n in names)


def _commit(temporary: str, path: str, files: Files, force: bool) -> None:
    """Give the finished folder its name; any failure brings the old state back."""
    parent = str(Path(path).parent)
    if not force or not os.path.lexists(path):
        files.rename(temporary, path)
        try:
            files.sync_path(parent)
        except BaseException:
            Path(path).rename(temporary)
            raise
    elif files.exchange(temporary, path):
        try:
            files.sync_path(parent)
        except BaseException:
            Files().exchange(temporary, path)
            raise
    else:
        old = f"{parent}/{temporary_name(Path(path).name, kind='old')}"
        files.rename(path, old)
        try:
            files.rename(temporary, path)
            files.sync_path(parent)
        except BaseException:
            if os.path.lexists(path):
                Path(path).rename(temporary)
            Path(old).rename(path)
            raise
        remove_any(old)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[FileWriter]:
    """A writer whose bytes appear under ``path`` when the block ends, all at once and durable.

    An existing regular file is replaced and keeps its permissions; links are followed. On any
    error before the rename the old file stays, and no temporary is left. Raises UsageError
    ``output-not-file``, ``folder-not-found``, LimitError ``disk-full``, InputError
    ``output-read-only``, ``write-failed``.
    """
    files = current_files()
    shown = os.fspath(path)
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise UsageError(f"{quote(shown)} exists and is not a regular file", code="output-not-file")
    if not target.parent.is_dir():
        raise UsageError(f"no folder {quote(str(target.parent))}", code="folder-not-found")
    for stale in stale_temporaries(str(target.parent), target.name):
        remove_any(stale)
    temporary = str(target.parent / temporary_name(target.name))
    try:
        with FileWriter(temporary, shown) as writer:
            yield writer
            if target.exists():
                writer.set_mode(stat.S_IMODE(target.stat().st_mode))
        try:
            files.rename(temporary, str(target))
            files.sync_path(str(target.parent))
        except OSError as e:
            raise write_error(e, shown, writer.bytes_written) from e
    finally:
        remove_any(temporary)


def write_file_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``: the file then holds all of it, or what it held before."""
    check_space(path, len(data))
    with atomic_file(path) as writer:
        writer.write(data)
