"""Buffers from CSV and their offsets to CSV, in the format of the public MiniMalloc instances.

The first line names the columns, in any order: ``id,lower,upper,size``, and where needed
``alignment``, ``gaps``, ``hint`` and ``offset`` (fixed; empty where it is not). Older names are
read too: ``buffer`` and ``buffer_id`` for ``id``, ``start`` and ``begin`` for ``lower``, and
``end`` for an upper end that is part of the lifetime. Gaps are separated by blanks, each
``lower-upper``, or ``lower-upper@first:end`` where those bytes stay in use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mopt.errors import InputError, UsageError, quote
from mopt.limits import DEFAULT_LIMITS, Limits
from mopt.memory import Buffer, Gap, MemoryPlan, MemoryProblem
from mopt.safe_read import open_file

_SAME = {
    "begin": "lower", "start": "lower", "buffer": "id", "buffer_id": "id", "end": "upper",
}  # fmt: skip
_NEEDED = ("id", "lower", "upper", "size")
_KNOWN = (*_NEEDED, "alignment", "gaps", "hint", "offset")
# Nineteen digits are more than any size that is accepted; longer ones are slow to convert.
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_GAP = re.compile(r"([0-9]{1,19})-([0-9]{1,19})(?:@([0-9]{1,19}):([0-9]{1,19}))?")


@dataclass(frozen=True)
class _Cell:
    """Text of one field and where it stands, lines and columns from 1."""

    text: str
    line: int
    column: int


@dataclass(frozen=True)
class _Source:
    name: str

    def error(self, cell: _Cell, message: str, code: str, hint: str | None = None) -> InputError:
        return InputError(
            message, code=code, hint=hint, site=f"{self.name}:{cell.line}:{cell.column}"
        )


def read_buffers(
    path: str | os.PathLike[str],
    capacity: int | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
) -> MemoryProblem:
    """The problem in a CSV file. Raises what ``parse_buffers`` and ``open_file`` raise."""
    with open_file(path, max_bytes=limits.csv_bytes) as file:
        return parse_buffers(file.read(), capacity, name=os.fspath(path))


def parse_buffers(
    data: bytes, capacity: int | None = None, *, name: str = "buffers.csv"
) -> MemoryProblem:
    """The problem that CSV holds; every error says line and column.

    Raises InputError: ``csv-encoding``, ``csv-header``, ``csv-fields`` (too many or too few),
    ``csv-number``, ``csv-name`` (empty), ``csv-gap``, ``duplicate-buffer``, and what ``Buffer``
    and ``MemoryProblem`` raise.
    """
    source = _Source(name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        before = data[: e.start]
        line = before.count(b"\n") + 1
        cell = _Cell("", line, e.start - (before.rfind(b"\n") + 1) + 1)
        raise source.error(cell, "the file is not UTF-8 text", "csv-encoding") from e
    rows = _rows(text)
    header = next(rows, None)
    if header is None:
        raise source.error(
            _Cell("", 1, 1), "the file is empty", "csv-header", f"begin with {','.join(_NEEDED)}"
        )
    columns, last_inclusive = _columns(source, header)
    seen: dict[str, int] = {}
    buffers: list[Buffer] = []
    for row in rows:
        if len(row) != len(header):
            at = row[min(len(row), len(header) + 1) - 1]
            raise source.error(
                at,
                f"the line has {len(row)} fields, the first line names {len(header)}",
                "csv-fields",
            )
        cells = dict(zip(columns, row, strict=True))
        if not cells["id"].text:
            raise source.error(cells["id"], "the buffer has no name", "csv-name")
        buffer = _buffer(source, cells, last_inclusive)
        if buffer.id in seen:
            raise source.error(
                cells["id"],
                f"buffer {quote(buffer.id)} is already on line {seen[buffer.id]}",
                "duplicate-buffer",
            )
        seen[buffer.id] = row[0].line
        buffers.append(buffer)
    return MemoryProblem(tuple(buffers), capacity)


def solution_csv(problem: MemoryProblem, plan: MemoryPlan) -> str:
    """The buffers with their planned offsets in the last column, in the order of the problem.

    Raises UsageError (``csv-name``) for a name that would not read back.
    """
    names = ["id", "lower", "upper", "size"]
    with_alignment = any(b.alignment != 1 for b in problem.buffers)
    with_gaps = any(b.gaps for b in problem.buffers)
    names += ["alignment"] if with_alignment else []
    names += ["gaps"] if with_gaps else []
    lines = [",".join([*names, "offset"])]
    for b in problem.buffers:
        if b.id.strip() != b.id or not b.id or any(c in b.id for c in ",\r\n"):
            raise UsageError(
                f"the name {quote(b.id)} cannot be written to CSV",
                code="csv-name",
                hint="names may hold no comma, no line end and no blank around them",
            )
        row = [b.id, str(b.lower), str(b.upper), str(b.size)]
        row += [str(b.alignment)] if with_alignment else []
        row += [" ".join(_gap_text(gap) for gap in b.gaps)] if with_gaps else []
        lines.append(",".join([*row, str(plan.offsets[b.id])]))
    return "\n".join(lines) + "\n"


def _gap_text(gap: Gap) -> str:
    window = f"@{gap.window[0]}:{gap.window[1]}" if gap.window else ""
    return f"{gap.lower}-{gap.upper}{window}"


def _rows(text: str) -> Iterator[list[_Cell]]:
    """The lines that are not empty, each as its fields without surrounding blanks."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        cells, column = [], 1
        for part in line.split(","):
            lead = len(part) - len(part.lstrip())
            cells.append(_Cell(part.strip(), number, column + lead))
            column += len(part) + 1
        yield cells


def _columns(source: _Source, header: Sequence[_Cell]) -> tuple[list[str], bool]:
    """The names of the columns, and whether the upper end belongs to the lifetime."""
    columns: list[str] = []
    for cell in header:
        name = _SAME.get(cell.text, cell.text)
        if name not in _KNOWN:
            raise source.error(
                cell,
                f"no column is called {quote(cell.text)}",
                "csv-header",
                f"known are {', '.join(_KNOWN)}",
            )
        if name in columns:
            raise source.error(cell, f"two columns hold the {name}", "csv-header")
        columns.append(name)
    missing = [name for name in _NEEDED if name not in columns]
    if missing:
        raise source.error(
            header[0],
            f"the first line names no column {', '.join(missing)}",
            "csv-header",
            f"needed are {', '.join(_NEEDED)}",
        )
    return columns, any(cell.text == "end" for cell in header)


def _buffer(source: _Source, cells: dict[str, _Cell], last_inclusive: bool) -> Buffer:
    extra = 1 if last_inclusive else 0
    numbers = {
        name: _integer(source, name, cell)
        for name, cell in cells.items()
        if name not in ("id", "gaps") and (cell.text or name in _NEEDED)
    }
    gaps = tuple(_gaps(source, cells["gaps"], extra)) if "gaps" in cells else ()
    try:
        return Buffer(
            cells["id"].text,
            numbers["lower"],
            numbers["upper"] + extra,
            numbers["size"],
            numbers.get("alignment", 1),
            gaps,
            offset=numbers.get("offset"),
            hint=numbers.get("hint"),
        )
    except InputError as e:
        # Its site is the field, which is a column here.
        raise source.error(cells[e.site or "id"], e.message, e.code, e.hint) from e


def _integer(source: _Source, name: str, cell: _Cell) -> int:
    if _INTEGER.fullmatch(cell.text) is None:
        what = f"found {quote(cell.text)}" if cell.text else "the field is empty"
        raise source.error(cell, f"{name} must be a whole number, {what}", "csv-number")
    return int(cell.text)


def _gaps(source: _Source, cell: _Cell, extra: int) -> Iterator[Gap]:
    for part in cell.text.split():
        match = _GAP.fullmatch(part)
        if match is None:
            raise source.error(
                cell,
                f"{quote(part)} is no gap",
                "csv-gap",
                "write 7-9, or 7-9@0:64 where bytes 0 to 64 stay in use",
            )
        lower, upper, first, end = match.groups()
        window = None if first is None else (int(first), int(end))
        yield Gap(int(lower), int(upper) + extra, window)
