"""Open files that a stranger may have written.

Two ways in. ``open_file(path)`` opens what the user named. ``Folder`` opens what a *file* named:
the name must keep the path rule, every segment is opened from its parent without following links,
and the last one must be a regular file with a single hard link on the folder's own device.
Runtimes were fooled through ``..``, symlinks and hard links in turn, so this check runs before any
of them sees a path, and they get ``OpenFile.handle_path``, which no rename can redirect.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mopt.errors import ArtifactError, InputError, LimitError, MoptError, quote
from mopt.limits import DEFAULT_LIMITS, Limits

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_CHUNK = 1 << 20


def check_name(name: object, *, where: str, limits: Limits = DEFAULT_LIMITS) -> tuple[str, ...]:
    """The segments of a relative path found inside the file ``where``.

    Raises ArtifactError ``unsafe-path`` unless it is 1 to 8 segments of letters, digits, ``.``,
    ``_`` and ``-``, none starting with a dot or reserved on Windows.
    """
    segments = name.split("/") if isinstance(name, str) else []
    good = 1 <= len(segments) <= limits.path_segments and all(
        len(s) <= limits.segment_chars
        and _SEGMENT.fullmatch(s)
        and not s.endswith(".")
        and not _RESERVED.fullmatch(s)
        for s in segments
    )
    if not good:
        raise ArtifactError(
            f"{where} names the path {quote(name)}, expected a plain relative path",
            code="unsafe-path",
            hint="the file is damaged or hostile; get the artifact again from its author",
        )
    return tuple(segments)


def check_names(names: Iterable[object], *, where: str, limits: Limits = DEFAULT_LIMITS) -> None:
    """``check_name`` for all, and no two equal when letter case is ignored."""
    seen: dict[str, object] = {}
    for name in names:
        key = "/".join(check_name(name, where=where, limits=limits)).casefold()
        if key in seen:
            raise ArtifactError(
                f"{where} names both {quote(seen[key])} and {quote(name)}", code="unsafe-path"
            )
        seen[key] = name


@dataclass
class OpenFile:
    """One opened regular file: ``name`` for messages, ``size`` when it was opened.

    Everything is read from this one handle, so what was checked is what is used. ``error`` is the
    class of error that readers raise about its contents.
    """

    fd: int
    name: str
    size: int
    error: type[MoptError] = ArtifactError

    @property
    def handle_path(self) -> str:
        """A path that opens this very file again while it is open, whatever its name is now."""
        return f"/proc/self/fd/{self.fd}"

    def read(self) -> bytes:
        """All bytes; an error (``file-changed``) if the size is not what it was when opened."""
        data = bytearray(self.size)
        view, done = memoryview(data), 0
        while done < self.size:
            count = os.preadv(self.fd, [view[done : done + _CHUNK]], done)
            if not count:
                break
            done += count
        self._check_unchanged(done)
        view.release()
        return bytes(data)

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``; an error where the file ends before."""
        parts, done = [], 0
        while done < length:
            part = os.pread(self.fd, min(length - done, _CHUNK), offset + done)
            if not part:
                raise self.error(
                    f"{self.name} ends at byte {offset + done}, expected {offset + length}",
                    code="file-truncated",
                )
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def sha256(self) -> str:
        """Hex digest of all bytes, without keeping them."""
        digest, done = hashlib.sha256(), 0
        while chunk := os.pread(self.fd, _CHUNK, done):
            digest.update(chunk)
            done += len(chunk)
        self._check_unchanged(done)
        return digest.hexdigest()

    def map(self, *, private_copy: bool = False) -> mmap.mmap:
        """The bytes mapped read-only; with ``private_copy`` writable, never reaching the file.

        An empty file cannot be mapped: check ``size`` first.
        """
        access = mmap.ACCESS_COPY if private_copy else mmap.ACCESS_READ
        return mmap.mmap(self.fd, self.size, access=access)

    def _check_unchanged(self, done: int) -> None:
        if done != self.size or os.fstat(self.fd).st_size != self.size:
            raise self.error(
                f"{self.name} changed while it was read: {self.size} bytes when opened",
                code="file-changed",
            )

    def close(self) -> None:
        """Give the handle back; mappings stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _adopt(
    fd: int, name: str, error: type[MoptError], max_bytes: int | None, device: int | None
) -> OpenFile:
    """Check what was opened before anything is read from it; closes ``fd`` when it refuses."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{name} is not a regular file", code="not-a-file")
        if device is not None:
            if status.st_nlink != 1:
                raise error(
                    f"{name} has {status.st_nlink} hard links, expected 1: it may be another file",
                    code="unsafe-file",
                    hint="copy the artifact with its data (cp -r), not with hard links",
                )
            if status.st_dev != device:
                raise error(f"{name} lies on another device than its folder", code="unsafe-file")
        if max_bytes is not None and status.st_size > max_bytes:
            raise LimitError(
                f"{name} has {status.st_size} bytes, at most {max_bytes} are read",
                code="file-too-large",
                hint="raise it with --limit if you trust the file",
            )
    except BaseException:
        os.close(fd)
        raise
    return OpenFile(fd, name, status.st_size, error)


def open_file(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> OpenFile:
    """Open a regular file the user named; links are followed, since he named them.

    Raises InputError (``file-not-found``, ``file-unreadable``, ``not-a-file``) or LimitError.
    """
    name = os.fspath(path)
    try:
        fd = os.open(name, _READ_FLAGS)
    except (OSError, ValueError) as e:
        raise _open_error(e, name, InputError) from e
    return _adopt(fd, name, InputError, max_bytes, None)


def _open_error(e: OSError | ValueError, name: str, error: type[MoptError]) -> MoptError:
    if isinstance(e, FileNotFoundError):
        return error(f"{quote(name)} does not exist", code="file-not-found")
    reason = e.strerror if isinstance(e, OSError) else str(e)
    return error(f"{quote(name)} cannot be opened: {reason}", code="file-unreadable")


class Folder:
    """A folder the user named, opened once; names from inside files are opened beneath it."""

    def __init__(self, path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> None:
        """Raises InputError (``folder-not-found``, ``not-a-folder``) if it cannot be opened."""
        self.path = Path(path)
        self.limits = limits
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as e:
            raise InputError(f"no folder {quote(str(path))}", code="folder-not-found") from e
        except NotADirectoryError as e:
            raise InputError(f"{quote(str(path))} is not a folder", code="not-a-folder") from e
        except (OSError, ValueError) as e:
            raise _open_error(e, str(path), InputError) from e
        self._device = os.fstat(self._fd).st_dev

    def open_file(self, name: object, *, max_bytes: int | None = None) -> OpenFile:
        """Open the file that ``name`` (a path found in a file) means beneath this folder.

        Raises ArtifactError (``unsafe-path``, ``unsafe-file``, ``not-a-file``, ``file-not-found``)
        or LimitError (``file-too-large``).
        """
        segments = check_name(name, where=str(self.path), limits=self.limits)
        shown = "/".join(segments)
        parent = os.dup(self._fd)
        try:
            for segment in segments[:-1]:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                below = os.open(segment, flags, dir_fd=parent)
                os.close(parent)
                parent = below
            fd = os.open(segments[-1], _READ_FLAGS | os.O_NOFOLLOW, dir_fd=parent)
        except FileNotFoundError as e:
            raise ArtifactError(
                f"{quote(shown)} is missing from {self.path}",
                code="file-not-found",
                hint="the artifact is incomplete; copy the whole folder",
            ) from e
        except OSError as e:
            # ELOOP and ENOTDIR are how O_NOFOLLOW reports a link in the last or an earlier segment.
            raise ArtifactError(
                f"{quote(shown)} in {self.path} is a link or cannot be opened: {e.strerror}",
                code="unsafe-file",
            ) from e
        finally:
            os.close(parent)
        return _adopt(fd, shown, ArtifactError, max_bytes, self._device)

    def has(self, name: str) -> bool:
        """Whether an entry of that plain name exists directly in the folder, link or not."""
        try:
            os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        """Give the handle back; files opened through it stay open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file the user named."""
    with open_file(path) as file:
        return file.sha256()
