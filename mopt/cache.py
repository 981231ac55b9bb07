"""What was measured before, by content: a second compile, or a resumed one, measures nothing twice.

    cache = Cache()
    loss = cache.remember("sensitivity", {"weight": "...", "format": "int4-g32"}, measure)

A record is a small JSON file named by the hash of its whole key, which it also holds: a hit
compares key and hash of the content, so a collision, a torn file or another program's file is a
miss, is dropped and said on the logger ``mopt.cache``. Tensors lie beside their record as
safetensors. Records never change; what a record depends on must be in its key.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable, Mapping
from functools import cache as once
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from mopt.disk import remove_any
from mopt.errors import InputError, MoptError, quote
from mopt.files import atomic_file, write_file_atomic
from mopt.json_files import json_bytes, read_json
from mopt.safe_read import open_file, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
# Tensors that are made faster than this are made again: reading them would gain nothing.
WORTH_SECONDS = 0.2
# Smaller ones take no memory to speak of, and are given back as they were made.
_MAPPED_FROM_BYTES = 1 << 20
_LOCK_SECONDS = 600.0
# Readers of JSON take strings of 4096 characters, a quotation mark counting as two.
_KEY_TEXT = 2000
_LIBRARIES = ("torch", "numpy", "onnx", "onnxruntime")
_log = logging.getLogger(__name__)


class Cache:
    """Records in a folder that only its user may read; None is the user's cache folder.

    A folder that cannot be written makes every look-up a miss and keeps nothing: a cache never
    stops a compile. ``hits`` and ``misses`` count look-ups. Of tensors it keeps what took at least
    ``worth_seconds`` to make.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        worth_seconds: float = WORTH_SECONDS,
    ) -> None:
        self.folder = Path(folder) if folder is not None else user_cache_path("mopt") / "records"
        self.worth_seconds = worth_seconds
        self.hits = 0
        self.misses = 0

    def get(self, bucket: str, key: Mapping[str, Any]) -> Any | None:
        """The value stored under ``key``, or None."""
        path = self._path(bucket, key)
        value = self._read(path, key) if self._is_ours() else None
        if value is None:
            self.misses += 1
        else:
            self.hits += 1
        return value

    def put(self, bucket: str, key: Mapping[str, Any], value: Any) -> None:
        """Keep ``value`` (JSON data, not None) under ``key``."""
        assert value is not None
        path = self._path(bucket, key)
        record = {"key": _shown(key), "sha256": _digest(_text(value)), "value": value}
        try:
            self._make(path.parent)
            write_file_atomic(path, json_bytes(record, indent=None))
        except (MoptError, OSError):
            return

    def remember(self, bucket: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The stored value, or ``make()``, stored.

        Another process that makes the same value is waited for, up to ten minutes.
        """
        found = self.get(bucket, key)
        if found is not None:
            return found
        path = self._path(bucket, key)
        try:
            self._make(path.parent)
            lock = FileLock(path.with_suffix(".lock"), timeout=_LOCK_SECONDS)
            lock.acquire()
        except (Timeout, MoptError, OSError):
            return make()
        try:
            found = self._read(path, key)  # made while we waited
            if found is None:
                found = make()
                self.put(bucket, key, found)
            return found
        finally:
            lock.release()
            remove_any(str(path.with_suffix(".lock")))

    def remember_tensors(
        self,
        bucket: str,
        key: Mapping[str, Any],
        make: Callable[[], tuple[Mapping[str, Tensor], Any]],
        *,
        always: bool = False,
    ) -> tuple[dict[str, Tensor], Any]:
        """Tensors by name and remarks (JSON data) as stored, or those of ``make()``, stored.

        Stored tensors lie over the mapped file, so that they take no memory: writing to one ends
        the process. With ``always`` they are kept however fast they were made.
        """
        stored = self.find_tensors(bucket, key)
        if stored is not None:
            return stored
        started = time.monotonic()
        made, remarks = make()
        if always or time.monotonic() - started >= self.worth_seconds:
            return self._put_tensors(bucket, key, made, remarks), remarks
        return dict(made), remarks

    def find_tensors(
        self, bucket: str, key: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Any] | None:
        """What :meth:`remember_tensors` stored under ``key``, or None."""
        stored = self.get(bucket, key)
        tensors = None if stored is None else self._read_tensors(bucket, key, stored)
        return None if stored is None or tensors is None else (tensors, stored["remarks"])

    def _put_tensors(
        self, bucket: str, key: Mapping[str, Any], made: Mapping[str, Tensor], remarks: Any
    ) -> dict[str, Tensor]:
        """Store; the tensors, large ones as the file has them now."""
        from mopt.safetensors_files import map_torch, write_safetensors

        path = self._path(bucket, key).with_suffix(".safetensors")
        try:
            self._make(path.parent)
            with atomic_file(path) as writer:
                write_safetensors(writer, made)
            digest = sha256_of(path)
            mapped = map_torch(path) if path.stat().st_size >= _MAPPED_FROM_BYTES else dict(made)
        except (MoptError, OSError):
            return dict(made)
        # The record comes last: without it the tensors are not there.
        self.put(bucket, key, {"tensors": digest, "remarks": remarks})
        return mapped

    def _read_tensors(
        self, bucket: str, key: Mapping[str, Any], stored: Any
    ) -> dict[str, Tensor] | None:
        from mopt.safetensors_files import map_torch

        path = self._path(bucket, key).with_suffix(".safetensors")
        try:
            with open_file(path) as file:
                if file.sha256() == stored["tensors"]:
                    return map_torch(file)
        except (MoptError, OSError, KeyError, TypeError):
            pass  # whatever is wrong with it, it is made again
        self._drop(path)
        self._drop(path.with_suffix(".json"))
        return None

    def _read(self, path: Path, key: Mapping[str, Any]) -> Any | None:
        if not path.is_file():
            return None
        try:
            record = read_json(path)
            if record["key"] == _shown(key) and record["sha256"] == _digest(_text(record["value"])):
                return record["value"]
        except (MoptError, OSError, KeyError, TypeError, ValueError):
            pass  # whatever is wrong with it, it is not a record of ours
        self._drop(path)
        return None

    def _drop(self, path: Path) -> None:
        if path.exists():
            _log.warning("the cache entry %s is damaged: dropped, and made again", path)
            remove_any(str(path))

    def _path(self, bucket: str, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{bucket}-v{SCHEMA}" / f"{_digest(_text(key))}.json"

    def _make(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._is_ours():
            raise InputError(
                f"the cache folder {quote(str(self.folder))} belongs to somebody else, or others "
                "may write to it",
                code="cache-owner",
            )

    def _is_ours(self) -> bool:
        """Whether the folder is the user's own and nobody else may write to it."""
        try:
            status = self.folder.stat()
        except OSError:
            return False
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return status.st_uid == os.getuid() and not shared


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic a stored number may depend on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@once
def source_hash(*files: str) -> str:
    """A hash of source files: what a computed record depends on besides its inputs."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _text(value: Any) -> str:
    return json_bytes(value, indent=None).decode()


def _shown(key: Mapping[str, Any]) -> str:
    """The key as a record has it: its text, the hash of one that is too long to be read back."""
    text = _text(key)
    return text if len(text) <= _KEY_TEXT else _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
