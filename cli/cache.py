"""Show where the disk went, and give it back.

The cache holds what was measured and calibrated before, by content. Removing any of it costs time,
never correctness.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from mopt.cli._command import Group
from mopt.cli._output import Column, Output
from mopt.cli._text import disk_size, plural

_DAY = 86_400


@dataclass(frozen=True)
class _Record:
    bucket: str
    path: Path
    bytes: int
    age_seconds: float


@click.group(cls=Group, help=__doc__)
def command() -> None:
    pass


def _folder() -> Path:
    from mopt.cache import Cache

    return Cache().folder


def _records(folder: Path) -> Iterator[_Record]:
    """The files of the cache, one level of buckets deep; links are not followed."""
    if not folder.is_dir() or folder.is_symlink():
        return
    now = time.time()
    for bucket in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not bucket.is_dir(follow_symlinks=False):
            continue
        for entry in sorted(os.scandir(bucket.path), key=lambda entry: entry.name):
            if entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                yield _Record(bucket.name, Path(entry.path), status.st_size, now - status.st_mtime)


def _is_current(bucket: str) -> bool:
    from mopt.cache import SCHEMA

    return bucket.endswith(f"-v{SCHEMA}")


@command.command("info")
@click.pass_obj
def info(out: Output) -> None:
    """Where the cache is, and what is in it."""
    folder = _folder()
    found = list(_records(folder))
    buckets = []
    for name in sorted({record.bucket for record in found}):
        inside = [record for record in found if record.bucket == name]
        buckets.append({
            "name": name, "records": len(inside), "bytes": sum(r.bytes for r in inside),
            "is_current": _is_current(name),
        })  # fmt: skip
    total = sum(record.bytes for record in found)
    if out.as_json:
        out.document({"folder": str(folder), "bytes": total, "buckets": buckets})
        return
    rows = [
        [str(b["name"]), str(b["records"]), disk_size(sum(r.bytes for r in found
         if r.bucket == b["name"])), "" if b["is_current"] else "of another mopt"]
        for b in buckets
    ]  # fmt: skip
    if rows and not out.quiet:
        out.table([Column("what"), Column("records", right=True), Column("size", right=True),
                   Column("")], rows)  # fmt: skip
    out.text(f"{folder}: {plural(len(found), 'record')}, {disk_size(total)}")


@command.command("clean")
@click.pass_obj
def clean(out: Output) -> None:
    """Remove everything in the cache."""
    _remove(out, list(_records(_folder())))


@command.command("prune")
@click.option(
    "--days", type=click.IntRange(min=0), default=30, show_default=True, metavar="N",
    help="Remove what was written longer ago.",
)  # fmt: skip
@click.pass_obj
def prune(out: Output, days: int) -> None:
    """Remove old records, and those that only another mopt could read."""
    old = [r for r in _records(_folder())
           if r.age_seconds > days * _DAY or not _is_current(r.bucket)]  # fmt: skip
    _remove(out, old)


def _remove(out: Output, found: list[_Record]) -> None:
    removed = freed = 0
    for record in found:
        try:
            record.path.unlink()
        except FileNotFoundError:
            continue  # another process was faster
        except OSError as error:
            out.warn(f"{record.path} could not be removed: {error.strerror}")
            continue
        removed += 1
        freed += record.bytes
    if out.as_json:
        out.document({"removed": removed, "bytes": freed})
    else:
        out.text(f"Removed {plural(removed, 'record')}, {disk_size(freed)}")
